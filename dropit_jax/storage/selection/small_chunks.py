"""Exact selection in chunks of a few elements, by comparisons alone.

Nothing is sorted, gathered or scattered: comparisons, reductions along the chunk and
chains of selections fuse into a few loops, and need no temporaries of the size of a
sort's. What these cost grows with the size of the chunk, or with its square.
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

# Up to so many kept elements a chunk, taking the maximum that many times is faster and
# needs less memory than ranking every element against every other.
_MAX_PASSES = 8

# XLA's CPU compiler makes vector instructions of a reduction of up to so many elements;
# of more in two steps, the second over so many parts: three to four times as fast.
_VECTOR = 16
_PARTS = 8

_WORD = 32

# The tag of what has none, which comes after all others.
_NO_SLOT = 255

# What `top_2_of_magnitudes` takes for the byte of those before the first. It looks for
# an index by the byte of that and a 1, which this is not, and makes such a byte of it.
BEFORE_FIRST = 0x10

# Numbers and their tags.
_Pair = tuple[Array, Array]


def top_k(
    x: Float[Array, "*rows size"], scores: Int[Array, "*rows size"], k: int
) -> tuple[Float[Array, "*rows {k}"], Int[Array, "*rows {k}"]]:
    """The elements of the k largest scores, largest first, and their indices."""
    indices = _largest_first(scores, k)
    here = indices[..., :, None] == _counted(x.shape[-1], x.ndim + 1)
    # By their bits: exact for -0.0 and NaN.
    taken = jnp.where(here, _bits(x)[..., None, :], 0).max(axis=-1)
    return _from_bits(taken, x), indices


def top_k_of_magnitudes(
    x: Float[Array, "*rows size"], k: int, halves: bool = False
) -> tuple[Float[Array, "*rows {k}"], list[UInt8[Array, "*rows"]]]:
    """`top_k`, where the scores are the elements' magnitudes.

    Args:
      x: chunks.
      k: how many elements of each to take.
      halves: a byte has two indices, which are below 16, the first in its lower half;
        k is even.

    Returns:
      The elements, largest first, and their indices, an array for each place, or for
      each two.
    """
    signed = lax.bitcast_convert_type(x, jnp.dtype(f"int{8 * x.dtype.itemsize}"))
    if k <= _MAX_PASSES:
        found = _passes(signed, k, halves)
        values = _from_bits(stack([bits for bits, _ in found]), x)
        return values, [tag for _, tag in (found[1::2] if halves else found)]
    values, indices = top_k(x, signed & np.iinfo(signed.dtype).max, k)
    apart = [indices[..., i].astype(jnp.uint8) for i in range(k)]
    if halves:
        apart = [a | b << 4 for a, b in zip(apart[::2], apart[1::2], strict=True)]
    return values, apart


def top_2_of_magnitudes(
    x: Float[Array, "*rows size"], before: UInt8[Array, "*rows"]
) -> tuple[Float[Array, "*rows 2"], UInt8[Array, "*rows"]]:
    """`top_k_of_magnitudes` for two, with `halves`, both found in the same way.

    Args:
      x: chunks.
      before: `BEFORE_FIRST` for each. It is an operand so that XLA does not know what
        it is: on a CPU one loop for both is compiled, in place of two.

    Returns:
      The elements, the larger first, and the byte of their indices.
    """
    signed = lax.bitcast_convert_type(x, jnp.dtype(f"int{8 * x.dtype.itemsize}"))
    size = signed.shape[-1]
    slots = np.arange(size, dtype=np.uint8) << 4
    upper, marks = last_axis.along(slots, signed), last_axis.along(slots | 1, signed)
    none, no_slot = lax.full_like(signed, 0), lax.full_like(upper, _NO_SLOT)
    found, tag = [], before
    for _ in range(2):
        at = last_axis.spread(tag, size)
        other = marks != at
        tags = upper | at >> np.uint8(4)
        left = lax.select(other, signed, none), lax.select(other, tags, no_slot)
        bits, tag = _first(*left)
        found.append(bits)
    return _from_bits(stack(found), x), tag


def largest(scores: Int[Array, "*rows size"], k: int) -> Bool[Array, "*rows size"]:
    """Where the k largest scores of each chunk are, ties to the lower index."""
    if k > _MAX_PASSES:
        return _ranks(scores) < k
    score, slot = _passes(scores, k)[-1]
    last, at = score[..., None], slot[..., None]
    slots = _indices(scores, np.uint8)
    return (scores > last) | ((scores == last) & (slots <= at))


def place(
    values: Shaped[Array, "*rows k"],
    indices: Sequence[Integer[Array, "*rows 1"]],
    size: int,
) -> Shaped[Array, "*rows {size}"]:
    """Chunks of zeros with values at these indices, an array for each value."""
    # A chain of selections, not a sum: it fuses with whatever reads the result.
    spread = [_spread(values, i, size) for i in range(len(indices))]
    placed = lax.full_like(spread[0], 0)
    slots = _indices(placed, indices[0].dtype)
    for index, value in zip(indices, spread, strict=True):
        placed = _select(index == slots, value, placed)
    return placed


def place_at_halves(
    values: Shaped[Array, "*rows k"], packed: UInt8[Array, "*rows bytes"], size: int
) -> Shaped[Array, "*rows {size}"]:
    """`place`, where a byte has two indices, the first in its lower half."""
    columns = [packed[..., i : i + 1] for i in range(packed.shape[-1])]
    indices = [i for byte in columns for i in (byte & 15, byte >> 4)]
    return place(values, indices, size)


def place_by_reduction(
    values: Shaped[Array, "*rows k"],
    positions: UInt8[Array, "*rows stored"],
    size: int,
    halves: bool,
) -> Shaped[Array, "*rows {size}"]:
    """`place`, or `place_at_halves`, by as few operations for any number of values.

    It is for a CPU, where XLA makes vector instructions of it for chunks of any size.
    There is no gradient, and what reads the result does not fuse with it.

    Args:
      values: of each chunk.
      positions: their indices, or with `halves` bytes of two.
      size: elements of a chunk.
      halves: as in `top_k_of_magnitudes`.
    """
    bits = last_axis.spread(_bits(values), size)
    slots = np.arange(size, dtype=np.uint8)
    if halves:
        at = last_axis.spread(positions, 2, size).reshape(bits.shape)
        half = np.stack([np.full_like(slots, 0x0F), np.full_like(slots, 0xF0)])
        wanted = np.stack([slots, slots << 4])
        half, wanted = (np.tile(x, (positions.shape[-1], 1)) for x in (half, wanted))
        here = at & last_axis.along(half, at) == last_axis.along(wanted, at)
    else:
        here = last_axis.spread(positions, size) == last_axis.along(slots, bits)
    apart = lax.select(here, bits, lax.full_like(bits, 0))
    none = np.zeros((), bits.dtype)
    return _from_bits(
        lax.reduce(apart, none, lax.bitwise_or, (apart.ndim - 2,)), values
    )


def compact(
    x: Shaped[Array, "*rows size"], mask: Bool[Array, "*rows size"], k: int
) -> Shaped[Array, "*rows {k}"]:
    """The k elements under the mask, in the order of their indices."""
    slots, order = _slots(mask), _counted(k, mask.ndim)
    bits = _bits(x)
    taken = lax.full_like(_spread(bits, 0, k), 0)
    for i in range(x.shape[-1]):
        here = mask[..., i : i + 1] & (slots[..., i : i + 1] == order)
        taken = _select(here, _spread(bits, i, k), taken)
    return _from_bits(taken, x)


def expand(
    values: Shaped[Array, "*rows k"], mask: Bool[Array, "*rows size"]
) -> Shaped[Array, "*rows size"]:
    """The inverse of `compact`: values under the mask, zero elsewhere."""
    slots = _slots(mask)
    placed = lax.full_like(_spread(values, 0, mask.shape[-1]), 0)
    for i in range(values.shape[-1]):
        here = mask & (slots == i)
        placed = _select(here, _spread(values, i, mask.shape[-1]), placed)
    return placed


def stack(parts: list[Int[Array, "*rows"]]) -> Int[Array, "*rows parts"]:
    """`jnp.stack` on a new last axis.

    By selections: XLA's CPU compiler makes a loop of branches out of a concatenation,
    which takes longer to compile and to run.
    """
    spread = [last_axis.spread(part, len(parts)) for part in parts]
    stacked, places = spread[-1], np.arange(len(parts))
    for i, part in enumerate(spread[:-1]):
        stacked = lax.select(last_axis.along(places == i, part), part, stacked)
    return stacked


def _largest_first(scores: Int[Array, "*rows size"], k: int) -> Array:
    """Indices of the k largest, largest first, ties to the lower index."""
    if k <= _MAX_PASSES:
        slots = [slot for _, slot in _passes(scores, k)]
        return stack(slots).astype(jnp.int32)
    order = _ranks(scores)[..., None, :] == _counted(k, scores.ndim)[..., None]
    return jnp.where(order, _indices(scores)[..., None, :], 0).max(axis=-1)


def _passes(
    signed: Int[Array, "*rows size"], k: int, halves: bool = False
) -> list[tuple[Int[Array, "*rows"], UInt8[Array, "*rows"]]]:
    """The k elements of largest magnitude, ties to the lower index, one by one.

    Args:
      signed: numbers, or the bits of floats; the sign is no part of the magnitude.
      k: how many.
      halves: as in `top_k_of_magnitudes`.

    Returns:
      Elements and their indices; with `halves` of each second the byte of two.
    """
    size, ones = signed.shape[-1], np.iinfo(signed.dtype).max
    magnitudes = signed & ones
    slots = last_axis.along(np.arange(size, dtype=np.uint8), signed)
    none, no_slot = lax.full_like(signed, 0), lax.full_like(slots, _NO_SLOT)
    found = [_first(signed, slots)]
    at = last_axis.spread(found[0][1], size)
    for i in range(1, k):
        if i == 1:
            after = slots != at  # all but the one
        else:
            # After the last that was found: no need to know the others. Below it, or
            # equal and of a higher index, with one operation less.
            last = last_axis.spread(found[-1][0] & ones, size)
            after = magnitudes - (slots > at).astype(signed.dtype) < last
        # Two in a byte are in the order of its upper half.
        second = halves and i % 2 == 1
        tags = slots << np.uint8(4) | at if second else slots
        left = lax.select(after, signed, none), lax.select(after, tags, no_slot)
        bits, tag = _first(*left)
        found.append((bits, tag))
        at = last_axis.spread(tag >> np.uint8(4) if second else tag, size)
    return found


# Traced once for all passes.
@functools.partial(jax.jit, inline=True)
def _first(signed: Int[Array, "*rows size"], tags: UInt8[Array, "*rows size"]) -> _Pair:
    """The largest magnitude of each chunk, ties to the lower tag, and its tag."""
    size = signed.shape[-1]
    if size <= _VECTOR or size % _PARTS:
        return _reduced(signed, tags)

    def by_parts(signed: Array, tags: Array) -> _Pair:
        parts = (*signed.shape[:-1], _PARTS, size // _PARTS)
        return _reduced(*_reduced(signed.reshape(parts), tags.reshape(parts)))

    return by_platform(_reduced, cpu=by_parts)(signed, tags)


def _reduced(
    signed: Int[Array, "*rows size"], tags: UInt8[Array, "*rows size"]
) -> _Pair:
    """`_first`, as one reduction."""
    ones = np.iinfo(signed.dtype).max

    def larger(one: _Pair, other: _Pair) -> _Pair:
        (a, tag_a), (b, tag_b) = one, other
        # |a| > |b|, or they are equal and the tag is lower, with one operation less.
        first = a & ones > (b & ones) - (tag_a < tag_b).astype(b.dtype)
        return lax.select(first, a, b), lax.select(first, tag_a, tag_b)

    none = np.array(0, signed.dtype), np.array(_NO_SLOT, np.uint8)
    return tuple(lax.reduce((signed, tags), none, larger, (signed.ndim - 1,)))


def _indices(
    x: Shaped[Array, "*rows size"], dtype: jax.typing.DTypeLike = np.int32
) -> Int[np.ndarray, "*ones size"]:
    """Each element's index in its chunk; of the same rank, which takes no broadcast."""
    return _counted(x.shape[-1], x.ndim, dtype)


def _counted(
    count: int, ndim: int, dtype: jax.typing.DTypeLike = np.int32
) -> Int[np.ndarray, "*ones count"]:
    """The numbers from 0, along the last of so many axes."""
    return np.arange(count, dtype=dtype).reshape(*[1] * (ndim - 1), -1)


def _spread(
    x: Shaped[Array, "*rows count"], i: int, size: int
) -> Shaped[Array, "*rows {size}"]:
    """The i-th element of each row, `size` times."""
    return last_axis.spread(lax.index_in_dim(x, i, x.ndim - 1, keepdims=False), size)


def _select(
    here: Bool[Array, "*shape"], x: Shaped[Array, "*shape"], y: Shaped[Array, "*shape"]
) -> Shaped[Array, "*shape"]:
    """`jnp.where`, without the call that it is to XLA's passes."""
    return lax.select(here, shardings.like(x, here), shardings.like(y, here))


def _ranks(scores: Int[Array, "*rows size"]) -> Int[Array, "*rows size"]:
    """How many elements of the chunk come before each: larger, or equal and earlier."""
    slots = last_axis.along(np.arange(scores.shape[-1]), scores)
    ranks = jnp.zeros(scores.shape, jnp.int32)
    # One comparison after the other: a sum over pairs would be a pass of its own.
    for i in range(scores.shape[-1]):
        least = scores - (i < slots).astype(scores.dtype)  # so that equal ones count
        ranks += (scores[..., i : i + 1] > least).astype(jnp.int32)
    return ranks


def _slots(mask: Bool[Array, "*rows size"]) -> Int[Array, "*rows size"]:
    """The place of each masked element among the masked elements of its chunk."""
    size = mask.shape[-1]
    slots = jnp.zeros(mask.shape, jnp.int32)
    for start in range(0, size, _WORD):
        part = mask[..., start : start + _WORD].astype(jnp.uint32)
        places = np.arange(part.shape[-1], dtype=np.uint32)
        part = part << last_axis.along(places, part)
        word = jnp.sum(part, axis=-1, keepdims=True, dtype=jnp.uint32)
        before = np.clip(np.arange(size) - start, 0, _WORD)
        these = ((1 << before) - 1).astype(np.uint32)
        earlier = word & last_axis.along(these, mask)
        slots += lax.population_count(earlier).astype(jnp.int32)
    return slots


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def _from_bits(bits: Array, like: Array) -> Array:
    return lax.bitcast_convert_type(bits, like.dtype)
