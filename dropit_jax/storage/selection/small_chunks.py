"""Selects exactly in chunks of a few elements, by comparisons alone.

Nothing is sorted, gathered or scattered: comparisons, reductions along the chunk and
chains of selects fuse into a few loops, without a sort's temporaries. The cost grows
with the size of the chunk, or with its square.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Integer, Shaped, UInt8

from dropit_jax.storage import last_axis
from dropit_jax.xla import shardings
from dropit_jax.xla.platforms import by_platform

# Up to so many kept elements per chunk, taking the maximum once for each of them is
# faster and needs less memory than ranking every element against every other.
_MAX_PASSES = 8

# XLA's CPU compiler vectorises a reduction of up to `_VECTOR` elements. A longer one is
# three to four times as fast in two steps, the second over `_PARTS` partial results.
_VECTOR = 16
_PARTS = 8

_WORD = 32

# The tag of no element; it loses every tie.
_NO_SLOT = 255

# The byte that `top_2_of_magnitudes` takes in its first pass. A pass skips the element
# i for which that byte is `i << 4 | 1` (here none), and gives a byte of the index that
# it finds, in the upper half, and the upper half of the byte taken (here 1).
BEFORE_FIRST = 0x10

# Integers and their tags.
_Pair = tuple[Array, Array]


def top_k(
    x: Float[Array, "*rows size"], scores: Int[Array, "*rows size"], k: int
) -> tuple[Float[Array, "*rows {k}"], Int[Array, "*rows {k}"]]:
    """Returns elements of the k largest scores, largest first, and their indices.

    Scores are not negative; ties go to the lower index.
    """
    indices = _largest_first(scores, k)
    here = indices[..., :, None] == _iota(x.shape[-1], x.ndim + 1)
    # On the bits, which keeps -0.0 and NaN exact.
    taken = jnp.where(here, _bits(x)[..., None, :], 0).max(axis=-1)
    return _from_bits(taken, x), indices


def top_k_of_magnitudes(
    x: Float[Array, "*rows size"], k: int, paired: bool = False
) -> tuple[Float[Array, "*rows {k}"], list[UInt8[Array, "*rows"]]]:
    """Returns `top_k` with the elements' magnitudes as scores.

    For `[1, -5, 2, 4]` and k = 2: elements `[-5, 4]` and indices `[1], [3]`; with
    `paired`, the byte `[0x31]`.

    Args:
      x: chunks.
      k: how many elements of each chunk to keep.
      paired: whether to pack two indices, which are below 16, into a byte, the first
        in its lower half; k is even.

    Returns:
      The elements, largest first, and their indices: an array for each rank, or with
      `paired` for each two.
    """
    signed = lax.bitcast_convert_type(x, jnp.dtype(f"int{8 * x.dtype.itemsize}"))
    if k <= _MAX_PASSES:
        found = _take_largest(signed, k, paired)
        values = _from_bits(stack([bits for bits, _ in found]), x)
        return values, [tag for _, tag in (found[1::2] if paired else found)]
    values, indices = top_k(x, signed & np.iinfo(signed.dtype).max, k)
    apart = [indices[..., i].astype(jnp.uint8) for i in range(k)]
    if paired:
        apart = [a | b << 4 for a, b in zip(apart[::2], apart[1::2], strict=True)]
    return values, apart


def top_2_of_magnitudes(
    x: Float[Array, "*rows size"], before: UInt8[Array, "*rows"]
) -> tuple[Float[Array, "*rows 2"], UInt8[Array, "*rows"]]:
    """Returns `top_k_of_magnitudes` for k = 2 with `paired`, by one loop run twice.

    Args:
      x: chunks.
      before: `BEFORE_FIRST` for each chunk. As an operand it is unknown to XLA, which
        on a CPU then compiles one loop for both passes, not two.

    Returns:
      The elements, the larger first, and the byte of their indices.
    """
    signed = lax.bitcast_convert_type(x, jnp.dtype(f"int{8 * x.dtype.itemsize}"))
    size = signed.shape[-1]
    slots = np.arange(size, dtype=np.uint8) << 4
    upper, marks = (
        last_axis.broadcast_to_rows(slots, signed),
        last_axis.broadcast_to_rows(slots | 1, signed),
    )
    none, no_slot = lax.full_like(signed, 0), lax.full_like(upper, _NO_SLOT)
    found, tag = [], before
    for _ in range(2):
        at = last_axis.repeat_in_blocks(tag, size)
        other = marks != at
        tags = upper | at >> np.uint8(4)
        remaining = lax.select(other, signed, none), lax.select(other, tags, no_slot)
        bits, tag = _max_and_tag(*remaining)
        found.append(bits)
    return _from_bits(stack(found), x), tag


def largest_mask(scores: Int[Array, "*rows size"], k: int) -> Bool[Array, "*rows size"]:
    """Returns whether each score is one of its chunk's k largest, as by `top_k`."""
    if k > _MAX_PASSES:
        return _ranks(scores) < k
    score, slot = _take_largest(scores, k)[-1]
    last, at = score[..., None], slot[..., None]
    slots = _chunk_iota(scores, np.uint8)
    return (scores > last) | ((scores == last) & (slots <= at))


def place(
    values: Shaped[Array, "*rows k"],
    indices: Sequence[Integer[Array, "*rows 1"]],
    size: int,
) -> Shaped[Array, "*rows {size}"]:
    """Returns chunks with values at their indices and zero elsewhere.

    `indices` has an array for each value of a chunk.
    """
    # A chain of selects, unlike a sum, fuses with the operations that read the result.
    spread = [_spread_nth(values, i, size) for i in range(len(indices))]
    placed = lax.full_like(spread[0], 0)
    slots = _chunk_iota(placed, indices[0].dtype)
    for index, value in zip(indices, spread, strict=True):
        placed = _select(index == slots, value, placed)
    return placed


def place_nibbles(
    values: Shaped[Array, "*rows k"], packed: UInt8[Array, "*rows bytes"], size: int
) -> Shaped[Array, "*rows {size}"]:
    """Returns `place` for two indices in a byte, the first in its lower half."""
    columns = [packed[..., i : i + 1] for i in range(packed.shape[-1])]
    indices = [i for byte in columns for i in (byte & 15, byte >> 4)]
    return place(values, indices, size)


def place_by_reduction(
    values: Shaped[Array, "*rows k"],
    positions: UInt8[Array, "*rows stored"],
    size: int,
    paired: bool,
) -> Shaped[Array, "*rows {size}"]:
    """Returns `place` or `place_nibbles`, by the same few operations for any k.

    For a CPU: XLA vectorises these operations for chunks of any size. They combine
    bits, so `values` has no gradient, and operations that read the result do not fuse
    with them.

    Args:
      values: values of each chunk.
      positions: their indices, or with `paired` bytes of two indices.
      size: elements of a chunk.
      paired: as in `top_k_of_magnitudes`.
    """
    bits = last_axis.repeat_in_blocks(_bits(values), size)
    slots = np.arange(size, dtype=np.uint8)
    if paired:
        at = last_axis.repeat_in_blocks(positions, 2, size).reshape(bits.shape)
        half = np.stack([np.full_like(slots, 0x0F), np.full_like(slots, 0xF0)])
        wanted = np.stack([slots, slots << 4])
        half, wanted = (np.tile(x, (positions.shape[-1], 1)) for x in (half, wanted))
        here = at & last_axis.broadcast_to_rows(
            half, at
        ) == last_axis.broadcast_to_rows(wanted, at)
    else:
        here = last_axis.repeat_in_blocks(
            positions, size
        ) == last_axis.broadcast_to_rows(slots, bits)
    apart = lax.select(here, bits, lax.full_like(bits, 0))
    none = np.zeros((), bits.dtype)
    return _from_bits(
        lax.reduce(apart, none, lax.bitwise_or, (apart.ndim - 2,)), values
    )


def compact(
    x: Shaped[Array, "*rows size"], mask: Bool[Array, "*rows size"], k: int
) -> Shaped[Array, "*rows {k}"]:
    """Returns the k elements under the mask, in the order of their indices."""
    slots, order = _ranks_under_mask(mask), _iota(k, mask.ndim)
    bits = _bits(x)
    taken = lax.full_like(_spread_nth(bits, 0, k), 0)
    for i in range(x.shape[-1]):
        here = mask[..., i : i + 1] & (slots[..., i : i + 1] == order)
        taken = _select(here, _spread_nth(bits, i, k), taken)
    return _from_bits(taken, x)


def expand(
    values: Shaped[Array, "*rows k"], mask: Bool[Array, "*rows size"]
) -> Shaped[Array, "*rows size"]:
    """Inverts `compact`: values under the mask, zero elsewhere."""
    slots = _ranks_under_mask(mask)
    placed = lax.full_like(_spread_nth(values, 0, mask.shape[-1]), 0)
    for i in range(values.shape[-1]):
        here = mask & (slots == i)
        placed = _select(here, _spread_nth(values, i, mask.shape[-1]), placed)
    return placed


def stack(parts: list[Int[Array, "*rows"]]) -> Int[Array, "*rows parts"]:
    """Stacks arrays on a new last axis, as `jnp.stack` does.

    It uses selects: XLA's CPU compiler makes a loop of branches of a concatenation,
    which takes longer to compile and to run.
    """
    spread = [last_axis.repeat_in_blocks(part, len(parts)) for part in parts]
    stacked, places = spread[-1], np.arange(len(parts))
    for i, part in enumerate(spread[:-1]):
        stacked = lax.select(
            last_axis.broadcast_to_rows(places == i, part), part, stacked
        )
    return stacked


def _largest_first(scores: Int[Array, "*rows size"], k: int) -> Array:
    """Returns the indices of the k largest scores; ties go to the lower index."""
    if k <= _MAX_PASSES:
        slots = [slot for _, slot in _take_largest(scores, k)]
        return stack(slots).astype(jnp.int32)
    order = _ranks(scores)[..., None, :] == _iota(k, scores.ndim)[..., None]
    return jnp.where(order, _chunk_iota(scores)[..., None, :], 0).max(axis=-1)


def _take_largest(
    signed: Int[Array, "*rows size"], k: int, paired: bool = False
) -> list[tuple[Int[Array, "*rows"], UInt8[Array, "*rows"]]]:
    """Finds the k elements of largest magnitude one by one, ties to the lower index.

    Args:
      signed: integers, or the bits of floats; the sign bit is not compared.
      k: how many.
      paired: as in `top_k_of_magnitudes`.

    Returns:
      Elements and their indices. With `paired`, each second index is the byte of two.
    """
    size, ones = signed.shape[-1], np.iinfo(signed.dtype).max
    magnitudes = signed & ones
    slots = last_axis.broadcast_to_rows(np.arange(size, dtype=np.uint8), signed)
    none, no_slot = lax.full_like(signed, 0), lax.full_like(slots, _NO_SLOT)
    found = [_max_and_tag(signed, slots)]
    at = last_axis.repeat_in_blocks(found[0][1], size)
    for i in range(1, k):
        if i == 1:
            after = slots != at
        else:
            # Elements after the last found one: smaller, or equal and of a higher
            # index (with one operation less). The earlier ones need not be known.
            last = last_axis.repeat_in_blocks(found[-1][0] & ones, size)
            after = magnitudes - (slots > at).astype(signed.dtype) < last
        # The lower half of these tags is the same in a chunk: it changes no order.
        second = paired and i % 2 == 1
        tags = slots << np.uint8(4) | at if second else slots
        remaining = lax.select(after, signed, none), lax.select(after, tags, no_slot)
        bits, tag = _max_and_tag(*remaining)
        found.append((bits, tag))
        at = last_axis.repeat_in_blocks(tag >> np.uint8(4) if second else tag, size)
    return found


# Jitted, so that all passes share one trace.
@functools.partial(jax.jit, inline=True)
def _max_and_tag(
    signed: Int[Array, "*rows size"], tags: UInt8[Array, "*rows size"]
) -> _Pair:
    """Returns each chunk's element of largest magnitude, and its tag.

    `(*rows, size) -> (*rows)`, for both. Of equal magnitudes the lower tag wins: the
    bits of the floats `[2, -5, 5]` and the tags `[0, 1, 2]` give the bits of -5, and 1.
    """
    size = signed.shape[-1]
    if size <= _VECTOR or size % _PARTS:
        return _reduce_max(signed, tags)

    def by_parts(signed: Array, tags: Array) -> _Pair:
        parts = (*signed.shape[:-1], _PARTS, size // _PARTS)
        return _reduce_max(*_reduce_max(signed.reshape(parts), tags.reshape(parts)))

    return by_platform(_reduce_max, cpu=by_parts)(signed, tags)


def _reduce_max(
    signed: Int[Array, "*rows size"], tags: UInt8[Array, "*rows size"]
) -> _Pair:
    """Returns `_max_and_tag`, computed by one reduction over the last axis."""
    ones = np.iinfo(signed.dtype).max

    def larger(one: _Pair, other: _Pair) -> _Pair:
        (a, tag_a), (b, tag_b) = one, other
        # |a| > |b|, or they are equal and the tag is lower, with one operation less.
        first = a & ones > (b & ones) - (tag_a < tag_b).astype(b.dtype)
        return lax.select(first, a, b), lax.select(first, tag_a, tag_b)

    none = np.array(0, signed.dtype), np.array(_NO_SLOT, np.uint8)
    return tuple(lax.reduce((signed, tags), none, larger, (signed.ndim - 1,)))


def _chunk_iota(
    x: Shaped[Array, "*rows size"], dtype: jax.typing.DTypeLike = np.int32
) -> Int[np.ndarray, "*ones size"]:
    """Returns indices in a chunk, in x's rank to avoid a broadcast: `(*ones, size)`."""
    return _iota(x.shape[-1], x.ndim, dtype)


def _iota(
    count: int, ndim: int, dtype: jax.typing.DTypeLike = np.int32
) -> Int[np.ndarray, "*ones count"]:
    """Returns 0, 1, 2, ... along the last of `ndim` axes."""
    return np.arange(count, dtype=dtype).reshape(*[1] * (ndim - 1), -1)


def _spread_nth(
    x: Shaped[Array, "*rows count"], i: int, size: int
) -> Shaped[Array, "*rows {size}"]:
    """Repeats the i-th element of each row: `(*rows, count) -> (*rows, size)`."""
    return last_axis.repeat_in_blocks(
        lax.index_in_dim(x, i, x.ndim - 1, keepdims=False), size
    )


def _select(
    here: Bool[Array, "*shape"], x: Shaped[Array, "*shape"], y: Shaped[Array, "*shape"]
) -> Shaped[Array, "*shape"]:
    """Returns `jnp.where` without the jitted call, which XLA would have to inline."""
    return lax.select(
        here, shardings.reshard_like(x, here), shardings.reshard_like(y, here)
    )


def _ranks(scores: Int[Array, "*rows size"]) -> Int[Array, "*rows size"]:
    """Returns how many elements of the chunk are larger, or equal and earlier."""
    slots = last_axis.broadcast_to_rows(np.arange(scores.shape[-1]), scores)
    ranks = jnp.zeros(scores.shape, jnp.int32)
    # Comparisons in a chain: a sum over pairs would be a loop of its own.
    for i in range(scores.shape[-1]):
        least = scores - (i < slots).astype(scores.dtype)  # so that equal ones count
        ranks += (scores[..., i : i + 1] > least).astype(jnp.int32)
    return ranks


def _ranks_under_mask(mask: Bool[Array, "*rows size"]) -> Int[Array, "*rows size"]:
    """Returns how many elements of the chunk are under the mask before each.

    For `[1, 0, 1, 1]`: `[0, 1, 1, 2]`.
    """
    size = mask.shape[-1]
    slots = jnp.zeros(mask.shape, jnp.int32)
    for start in range(0, size, _WORD):
        part = mask[..., start : start + _WORD].astype(jnp.uint32)
        places = np.arange(part.shape[-1], dtype=np.uint32)
        part = part << last_axis.broadcast_to_rows(places, part)
        word = jnp.sum(part, axis=-1, keepdims=True, dtype=jnp.uint32)
        before = np.clip(np.arange(size) - start, 0, _WORD)
        earlier_bits = ((1 << before) - 1).astype(np.uint32)
        earlier = word & last_axis.broadcast_to_rows(earlier_bits, mask)
        slots += lax.population_count(earlier).astype(jnp.int32)
    return slots


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def _from_bits(bits: Array, like: Array) -> Array:
    return lax.bitcast_convert_type(bits, like.dtype)
