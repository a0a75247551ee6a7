"""Exact selection in chunks of a few elements, by comparisons alone.

Nothing is sorted, gathered or scattered: comparisons, reductions along the chunk and
chains of selections fuse into a few loops, and need no temporaries of the size of a
sort's. What these cost grows with the size of the chunk, or with its square.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Integer, Shaped, UInt8

from dropit_jax import chunking, shardings
from dropit_jax.platforms import by_platform

# Up to so many kept elements a chunk, taking the maximum that many times is faster and
# needs less memory than ranking every element against every other.
_MAX_PASSES = 8

# XLA's CPU compiler makes vector instructions of a reduction of up to so many elements;
# of more in two steps, the second over so many parts: three to four times as fast.
_VECTOR = 16
_PARTS = 4

# Of fewer elements LLVM makes no loop.
_LANES = 32

_WORD = 32

# Scores and their tags.
_Pair = tuple[Array, Array]


def top_k(
    x: Float[Array, "*rows size"], scores: Int[Array, "*rows size"], k: int
) -> tuple[Float[Array, "*rows {k}"], Int[Array, "*rows {k}"]]:
    """The elements of the k largest scores, largest first, and their indices."""
    indices = _largest_first(scores, k)
    here = indices[..., :, None] == jnp.arange(x.shape[-1])
    # By their bits: exact for -0.0 and NaN.
    taken = jnp.where(here, _bits(x)[..., None, :], 0).max(axis=-1)
    return _from_bits(taken, x), indices


def top_k_of_magnitudes(
    x: Float[Array, "*rows size"], magnitudes: Int[Array, "*rows size"], k: int
) -> tuple[Float[Array, "*rows {k}"], list[Int[Array, "*rows"]]]:
    """`top_k`, where the scores are the elements' bits without the sign.

    The passes that find the largest then have all of the element but its sign, which
    goes with its index.

    Returns:
      The elements, largest first, and the index of each, an array for each place.
    """
    if k > _MAX_PASSES:
        values, indices = top_k(x, magnitudes, k)
        return values, [indices[..., i] for i in range(k)]
    signs = magnitudes.dtype.itemsize * 8 - 1
    negative = lax.bitcast_convert_type(x, magnitudes.dtype) >> signs  # -1, or 0
    even = _in_rows(2 * np.arange(x.shape[-1]), x.shape, np.int32)
    slots = shardings.like(even, x) - negative.astype(jnp.int32)
    found = _passes(magnitudes, slots, k)
    bits = [score | tag.astype(score.dtype) << signs for score, tag in found]
    return _from_bits(stack(bits), x), [tag >> 1 for _, tag in found]


def largest(scores: Int[Array, "*rows size"], k: int) -> Bool[Array, "*rows size"]:
    """Where the k largest scores of each chunk are, ties to the lower index."""
    if k > _MAX_PASSES:
        return _ranks(scores) < k
    slots = _indices(scores)
    score, slot = _passes(scores, slots, k)[-1]
    last, at = score[..., None], slot[..., None]
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
    values: Shaped[Array, "*rows k"],
    packed: UInt8[Array, "*rows bytes"],
    size: int,
    grouped: bool = False,
) -> Shaped[Array, "*rows {size}"]:
    """`place`, where a byte has two indices, the first in its lower half.

    Args:
      values: of each chunk.
      packed: their indices.
      size: elements of a chunk.
      grouped: one loop goes through neighbouring chunks, which are on one device; there
        is no gradient. LLVM takes a loop of few elements for a CPU apart, which is much
        longer to compile than the vector instructions that it finds for more of them.
    """
    *rows, _ = values.shape
    groups, together = _groups(values, size) if grouped else (tuple(rows), 1)
    lanes = np.arange(together * size)
    whole = (*groups, lanes.size)

    def of_each_lane(x: Array) -> list[Array]:
        """The numbers of the chunk that a lane is in."""
        count = x.shape[-1]
        x = x.reshape(*groups, together * count)
        spread = [_spread(x, i, lanes.size) for i in range(together * count)]
        found = spread[:count]
        for chunk in range(1, together):
            # By bits: of a selection between numbers in memory LLVM makes one of their
            # addresses, and loads them one by one.
            ones = np.iinfo(x.dtype).max
            behind = _in_rows((lanes >= chunk * size) * ones, whole, x.dtype)
            others = spread[chunk * count : (chunk + 1) * count]
            found = [a ^ (a ^ b) & behind for a, b in zip(found, others, strict=True)]
        return found

    kept = of_each_lane(values if together == 1 else _bits(values))
    indices = [i for byte in of_each_lane(packed) for i in (byte & 15, byte >> 4)]
    slots = _in_rows(lanes % size, whole, packed.dtype)
    placed = lax.full_like(kept[0], 0)
    for index, value in zip(indices, kept, strict=True):
        placed = _select(index == shardings.like(slots, index), value, placed)
    placed = placed.reshape(*rows, size)
    return placed if together == 1 else _from_bits(placed, values)


def compact(
    x: Shaped[Array, "*rows size"], mask: Bool[Array, "*rows size"], k: int
) -> Shaped[Array, "*rows {k}"]:
    """The k elements under the mask, in the order of their indices."""
    slots, order = _slots(mask), jnp.arange(k)
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
    spread = [chunking.repeat(part, len(parts)) for part in parts]
    stacked, places = spread[-1], np.arange(len(parts))
    for i, part in enumerate(spread[:-1]):
        here = _in_rows(places == i, part.shape, bool)
        stacked = lax.select(shardings.like(here, part), part, stacked)
    return stacked


def _largest_first(scores: Int[Array, "*rows size"], k: int) -> Array:
    """Indices of the k largest, largest first, ties to the lower index."""
    if k <= _MAX_PASSES:
        return stack([slot for _, slot in _passes(scores, _indices(scores), k)])
    order = _ranks(scores)[..., None, :] == jnp.arange(k)[:, None]
    return jnp.where(order, _indices(scores), 0).max(axis=-1)


def _passes(
    scores: Int[Array, "*rows size"],
    tags: Int[Array | np.ndarray, "*#rows size"],
    k: int,
) -> list[tuple[Int[Array, "*rows"], Int[Array, "*rows"]]]:
    """The k largest scores, ties to the lower tag, and their tags, one by one.

    Args:
      scores: not negative.
      tags: in the order of the indices.
      k: how many.
    """
    tags = jnp.asarray(tags)
    if tags.shape != scores.shape:
        tags += jnp.zeros_like(scores, dtype=jnp.int32)  # sharded like the scores
    least = lax.full_like(scores, -1)
    found: list[_Pair] = []
    for _ in range(k):
        left = scores
        if found:
            least_found, at_tag = found[-1]
            at = chunking.repeat(at_tag, scores.shape[-1])
            if len(found) == 1:
                after = tags != at  # all but the one
            else:
                # After the last that was found: no need to know the others.
                last = chunking.repeat(least_found, scores.shape[-1])
                after = (scores < last) | ((scores == last) & (tags > at))
            left = lax.select(after, scores, least)
        found.append(_first(left, tags))
    return found


def _first(scores: Int[Array, "*rows size"], tags: Int[Array, "*rows size"]) -> _Pair:
    """The largest score of each chunk, ties to the lower tag, and its tag."""
    size = scores.shape[-1]
    if size <= _VECTOR or size % _PARTS:
        return _reduced(scores, tags)

    def by_parts(scores: Array, tags: Array) -> _Pair:
        parts = (*scores.shape[:-1], _PARTS, size // _PARTS)
        return _reduced(*_reduced(scores.reshape(parts), tags.reshape(parts)))

    return by_platform(_reduced, cpu=by_parts)(scores, tags)


def _reduced(scores: Int[Array, "*rows size"], tags: Int[Array, "*rows size"]) -> _Pair:
    """`_first`, as one reduction."""

    def larger(one: _Pair, other: _Pair) -> _Pair:
        (a, tag_a), (b, tag_b) = one, other
        # a > b, or they are equal and the tag is lower, with one operation less.
        first = a > b - (tag_a < tag_b).astype(b.dtype)
        return lax.select(first, a, b), lax.select(first, tag_a, tag_b)

    least = np.array(-1, scores.dtype)
    greatest = np.array(np.iinfo(np.int32).max, np.int32)
    axes = (scores.ndim - 1,)
    return tuple(lax.reduce((scores, tags), (least, greatest), larger, axes))


def _groups(x: Shaped[Array, "*rows k"], size: int) -> tuple[tuple[int, ...], int]:
    """Rows, of neighbouring chunks with `_LANES` elements, and the chunks of each."""
    *rows, _ = x.shape
    together = -(-_LANES // size)
    outer = [axis for axis, count in enumerate(rows) if count != 1]
    if not outer or rows[outer[-1]] % together or any(shardings.spec(x)):
        return tuple(rows), 1
    rows[outer[-1]] //= together
    return tuple(rows), together


def _indices(
    x: Shaped[Array, "*rows size"], dtype: jax.typing.DTypeLike = np.int32
) -> Int[np.ndarray, "*ones size"]:
    """Each element's index in its chunk; of the same rank, which takes no broadcast."""
    return np.arange(x.shape[-1], dtype=dtype).reshape(*[1] * (x.ndim - 1), -1)


def _in_rows(
    x: Shaped[np.ndarray, "size"],
    shape: tuple[int, ...],
    dtype: jax.typing.DTypeLike,
) -> Shaped[Array, "*shape"]:
    """The same in each row."""
    return lax.broadcast_in_dim(x.astype(dtype), shape, (len(shape) - 1,))


def _spread(
    x: Shaped[Array, "*rows count"], i: int, size: int
) -> Shaped[Array, "*rows {size}"]:
    """The i-th element of each row, `size` times."""
    return chunking.repeat(lax.index_in_dim(x, i, x.ndim - 1, keepdims=False), size)


def _select(
    here: Bool[Array, "*shape"], x: Shaped[Array, "*shape"], y: Shaped[Array, "*shape"]
) -> Shaped[Array, "*shape"]:
    """`jnp.where`, without the call that it is to XLA's passes."""
    return lax.select(here, shardings.like(x, here), shardings.like(y, here))


def _ranks(scores: Int[Array, "*rows size"]) -> Int[Array, "*rows size"]:
    """How many elements of the chunk come before each: larger, or equal and earlier."""
    slots = jnp.arange(scores.shape[-1])
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
        places = jnp.arange(part.shape[-1], dtype=jnp.uint32)
        word = jnp.sum(part << places, axis=-1, keepdims=True, dtype=jnp.uint32)
        before = np.clip(np.arange(size) - start, 0, _WORD)
        earlier = word & jnp.asarray((1 << before) - 1, jnp.uint32)
        slots += lax.population_count(earlier).astype(jnp.int32)
    return slots


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def _from_bits(bits: Array, like: Array) -> Array:
    return lax.bitcast_convert_type(bits, like.dtype)
