"""Which elements of a chunk stay: exact top-k along the last axis.

Every method gives what `lax.top_k(abs(x), k)` gives: largest magnitude first, ties to
the lower index, NaN above infinity. They differ in how XLA compiles them. A random
sample is the top-k of random scores.

Chunks of at most `MAX_FUSED` elements are never sorted, gathered from or scattered
into: they use comparisons and one-hot sums alone, which fuse into a few loops and need
no temporaries of the size of a sort's. Larger ones find the k-th largest element by
bisection and sort the k elements from there on. Both stay where the data is on a
sharded mesh; `lax.top_k` makes XLA gather the chunks on every device.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Integer, Shaped

from dropit_jax.policy import Selection

# The largest chunk that selects by fused comparisons. Beyond, they cost more than
# bisection does.
MAX_FUSED = 64

# Up to so many kept elements a chunk, taking the maximum that many times is faster and
# needs less memory than ranking every element against every other.
_MAX_PASSES = 4


def top_k(
    x: Float[Array, "*rows size"],
    k: int,
    selection: Selection = "auto",
    scores: Int[Array, "*rows size"] | None = None,
) -> tuple[Float[Array, "*rows {k}"], Int[Array, "*rows {k}"]]:
    """The k elements of largest magnitude along the last axis, largest first.

    Args:
      x: chunks.
      k: how many elements of each chunk to take.
      selection: `"top_k"` forces `lax.top_k`; `"auto"` takes the method for this size.
      scores: what to rank the elements by in place of their magnitude, not negative.

    Returns:
      The elements (with their sign) and their indices.
    """
    if selection == "top_k":
        indices = lax.top_k(jnp.abs(x) if scores is None else scores, k)[1]
        return jnp.take_along_axis(x, indices, axis=-1), indices
    scores = _magnitude(x) if scores is None else scores
    if x.shape[-1] > MAX_FUSED:
        indices = _sorted_largest(scores, k)
        return jnp.take_along_axis(x, indices, axis=-1), indices
    indices = _largest_first(scores, k)
    return _take(x, indices[..., :, None] == jnp.arange(x.shape[-1])), indices


def top_k_mask(
    x: Float[Array, "*rows size"],
    k: int,
    selection: Selection = "auto",
    scores: Int[Array, "*rows size"] | None = None,
) -> Bool[Array, "*rows size"]:
    """Where the k elements of largest magnitude are, along the last axis.

    The arguments and the elements chosen are those of `top_k`.
    """
    if selection == "top_k":
        indices = lax.top_k(jnp.abs(x) if scores is None else scores, k)[1]
        ones = jnp.ones(indices.shape, bool)
        return _scatter(ones, indices, x.shape[-1])
    scores = _magnitude(x) if scores is None else scores
    if x.shape[-1] > MAX_FUSED:
        return _largest_mask(scores, k)
    if k > _MAX_PASSES:
        return _ranks(scores) < k
    indices = _largest_first(scores, k)
    return (indices[..., :, None] == jnp.arange(x.shape[-1])).any(axis=-2)


def random_scores(key: Array, shape: tuple[int, ...]) -> Int[Array, "*shape"]:
    """Scores whose top-k is a uniform sample.

    Two of them are equal, and the choice between them not random, with a probability
    of 2**-31.
    """
    return (jax.random.bits(key, shape, jnp.uint32) >> 1).astype(jnp.int32)


def place(
    values: Shaped[Array, "*rows k"], indices: Integer[Array, "*rows k"], size: int
) -> Shaped[Array, "*rows {size}"]:
    """Puts values back where they came from, and zero elsewhere.

    Args:
      values: kept elements of each chunk.
      indices: their indices in the chunk, without repetition.
      size: elements of the chunk.
    """
    if size > MAX_FUSED:
        return _scatter(values, indices.astype(jnp.int32), size)
    slots = jnp.arange(size, dtype=indices.dtype)
    # A chain of selections, not a sum: it fuses with whatever reads the result.
    placed = jnp.zeros((*values.shape[:-1], size), values.dtype)
    for i in range(values.shape[-1]):
        here = indices[..., i : i + 1] == slots
        placed = jnp.where(here, values[..., i : i + 1], placed)
    return placed


def compact(
    x: Shaped[Array, "*rows size"], mask: Bool[Array, "*rows size"], k: int
) -> Shaped[Array, "*rows {k}"]:
    """The k elements under the mask, in the order of their indices."""
    if x.shape[-1] <= MAX_FUSED:
        slots, order = _fused_slots(mask), jnp.arange(k)
        bits = _bits(x)
        taken = jnp.zeros((*x.shape[:-1], k), bits.dtype)
        for i in range(x.shape[-1]):
            here = mask[..., i : i + 1] & (slots[..., i : i + 1] == order)
            taken = jnp.where(here, bits[..., i : i + 1], taken)
        return _from_bits(taken, x.dtype)
    slots = _slots(mask)
    target = jnp.where(mask, slots, k)  # the dropped share one slot, then cut off
    return _scatter(x, target, k + 1)[..., :k]


def expand(
    values: Shaped[Array, "*rows k"], mask: Bool[Array, "*rows size"]
) -> Shaped[Array, "*rows size"]:
    """The inverse of `compact`: values under the mask, zero elsewhere."""
    k = values.shape[-1]
    if mask.shape[-1] <= MAX_FUSED:
        slots = _fused_slots(mask)
        placed = jnp.zeros(mask.shape, values.dtype)
        for i in range(k):
            placed = jnp.where(mask & (slots == i), values[..., i : i + 1], placed)
        return placed
    slots = _slots(mask)
    taken = jnp.take_along_axis(values, jnp.clip(slots, 0, k - 1), axis=-1)
    return jnp.where(mask, taken, 0)


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def _from_bits(bits: Array, dtype: jax.typing.DTypeLike) -> Array:
    return lax.bitcast_convert_type(bits, dtype)


def _magnitude(x: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    """|x| as an integer of the same order.

    The bits of a non-negative float order like the float, with NaN above infinity,
    and unlike floats they compare exactly where denormal numbers are flushed to zero.
    """
    signed = lax.bitcast_convert_type(x, jnp.dtype(f"int{8 * x.dtype.itemsize}"))
    return signed & jnp.iinfo(signed.dtype).max


def _largest_first(scores: Int[Array, "*rows size"], k: int) -> Array:
    """Indices of the k largest, largest first, ties to the lower index."""
    size = scores.shape[-1]
    slots = jnp.arange(size)
    if k > _MAX_PASSES:
        ranks = _ranks(scores)
        order = ranks[..., None, :] == jnp.arange(k)[:, None]
        return jnp.where(order, slots, 0).max(axis=-1)
    passes = []
    for _ in range(k):
        largest = lax.argmax(scores, scores.ndim - 1, jnp.int32)
        passes.append(largest)
        scores = jnp.where(largest[..., None] == slots, -1, scores)
    return jnp.stack(passes, axis=-1)


def _ranks(scores: Int[Array, "*rows size"]) -> Int[Array, "*rows size"]:
    """How many elements of the chunk come before each: larger, or equal and earlier."""
    slots = jnp.arange(scores.shape[-1])
    ranks = jnp.zeros(scores.shape, jnp.int32)
    # One comparison after the other: a sum over pairs would be a pass of its own.
    for i in range(scores.shape[-1]):
        least = scores - (i < slots).astype(scores.dtype)  # so that equal ones count
        ranks += (scores[..., i : i + 1] > least).astype(jnp.int32)
    return ranks


def _sorted_largest(scores: Int[Array, "*rows size"], k: int) -> Array:
    """Indices of the k largest, largest first, ties to the lower index."""
    mask = _largest_mask(scores, k)
    slots = jnp.broadcast_to(jnp.arange(scores.shape[-1]), scores.shape)
    indices = compact(slots, mask, k)
    # The order of the indices is the one that a stable sort leaves to equal scores.
    order = jnp.argsort(-jnp.take_along_axis(scores, indices, axis=-1), axis=-1)
    return jnp.take_along_axis(indices, order, axis=-1)


def _largest_mask(scores: Int[Array, "*rows size"], k: int) -> Array:
    """Where the k largest are, ties to the lower index.

    Finds the k-th largest score bit by bit, from the highest: a bit belongs to it if at
    least k scores are no less with the bit set.
    """
    bits = 8 * scores.dtype.itemsize - 1
    one = jnp.ones((), scores.dtype)

    def next_bit(i: Array, kth: Array) -> Array:
        candidate = kth | (one << (bits - 1 - i).astype(scores.dtype))
        count = jnp.sum(scores >= candidate, axis=-1, keepdims=True, dtype=jnp.int32)
        return jnp.where(count >= k, candidate, kth)

    start = jnp.zeros_like(scores[..., :1])
    kth = lax.fori_loop(0, bits, next_bit, start)
    above, equal = scores > kth, scores == kth
    room = k - jnp.sum(above, axis=-1, keepdims=True, dtype=jnp.int32)
    return above | (equal & (jnp.cumsum(equal, axis=-1, dtype=jnp.int32) <= room))


def _scatter(
    values: Shaped[Array, "*rows k"], indices: Integer[Array, "*rows k"], size: int
) -> Shaped[Array, "*rows {size}"]:
    def row(values: Array, indices: Array) -> Array:
        zeros = jnp.zeros(size, values.dtype)
        return zeros.at[indices].set(values, mode="promise_in_bounds")

    # `jax.vmap` marks the leading axes as a batch for XLA, which then leaves them on
    # their devices; `jnp.put_along_axis` does not.
    for _ in values.shape[:-1]:
        row = jax.vmap(row)
    return row(values, indices)


def _slots(mask: Bool[Array, "*rows size"]) -> Int[Array, "*rows size"]:
    """The place of each masked element among the masked elements of its chunk."""
    return jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1


def _fused_slots(mask: Bool[Array, "*rows size"]) -> Int[Array, "*rows size"]:
    """`_slots` by counting bits, without the passes of a cumulative sum."""
    size = mask.shape[-1]
    slots = jnp.zeros(mask.shape, jnp.int32)
    for start in range(0, size, 32):
        part = mask[..., start : start + 32].astype(jnp.uint32)
        places = jnp.arange(part.shape[-1], dtype=jnp.uint32)
        word = jnp.sum(part << places, axis=-1, keepdims=True, dtype=jnp.uint32)
        before = np.clip(np.arange(size) - start, 0, 32)
        earlier = word & jnp.asarray((1 << before) - 1, jnp.uint32)
        slots += lax.population_count(earlier).astype(jnp.int32)
    return slots


def _take(x: Array, one_hot: Bool[Array, "*rows k size"]) -> Shaped[Array, "*rows k"]:
    """The element under each one-hot row, by its bits: exact for -0.0 and NaN."""
    taken = jnp.where(one_hot, _bits(x)[..., None, :], 0).max(axis=-1)
    return _from_bits(taken, x.dtype)
