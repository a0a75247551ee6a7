"""Selects exactly in chunks of any size, without sorting.

The k-th largest score is found by bisection on its bits. The kept elements are then a
bit vector, of which two queries are needed: how many bits are set before each bit, and
where the j-th set bit is.

XLA's CPU compiler takes as long for a loop of one operation as for a loop of many, and
processes all operations of each layer again: this module has few loops and operations.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, Integer, Shaped, UInt32

from dropit_jax.storage import last_axis
from dropit_jax.storage.selection import bit_vectors
from dropit_jax.xla import shardings

# The longest axis that XLA's CPU compiler sums in one loop, not two.
_LONGEST = 32


def largest_words(
    scores: Int[Array, "*rows size"], k: int | Int[np.ndarray, "chunks"]
) -> UInt32[Array, "*rows words"]:
    """Returns a bit mask of each chunk's k largest scores, ties to the lower index.

    `(*rows, size) -> (*rows, ceil(size / 32))`, packed as by `bit_vectors.to_words`:
    for the scores `[3, 9, 0, 9]` and k = 2 the word `[0b1010]`.

    Args:
      scores: the scores, not negative; the last axis is a chunk.
      k: the number of kept elements of a chunk; or a number for each chunk along the
        axis before the last.
    """
    size, lead = scores.shape[-1], scores.ndim - 1
    axes = list(bit_vectors.BITS.shape)
    while -(-size // math.prod(axes)) > _LONGEST:
        axes.insert(0, _LONGEST)
    each = last_axis.split(scores, *axes, fill=-1)  # -1 is never among the largest
    kth, ties = _kth_largest(each, lead, np.asarray(k, np.int32))
    kth = last_axis.repeat_in_blocks(kth, *each.shape[lead:])
    tied = each == kth
    words = bit_vectors.combine_parts(tied)
    before = bit_vectors.count_before_words(last_axis.merge(words, lead + 1)).reshape(
        words.shape
    )
    first = bit_vectors.count_before_bits(words, before) < last_axis.repeat_in_blocks(
        ties, *each.shape[lead:]
    )
    kept = bit_vectors.combine_parts((each > kth) | (tied & first))
    return last_axis.merge(kept, lead + 1, bit_vectors.word_count(size))


def indices_of_set_bits(
    words: UInt32[Array, "*rows words"], k: int
) -> Int[Array, "*rows {k}"]:
    """Returns the indices of the first k set bits, in ascending order.

    For the words `[0b101, 0b10]` and k = 3: `[0, 2, 33]`.

    Args:
      words: words with at least k set bits in each chunk.
      k: the number of indices of a chunk.
    """
    before = bit_vectors.count_before_words(words)
    word = _word_of_each(before, k)
    bit = bit_vectors.nth_bit(take(words, word), _iota(word) - take(before, word))
    return word * bit_vectors.BITS.size + bit


def take(
    x: Shaped[Array, "*rows size"], indices: Int[Array, "*rows k"]
) -> Shaped[Array, "*rows k"]:
    """Returns each chunk's elements at its indices: `(*rows, size) -> (*rows, k)`."""
    rows = tuple(range(x.ndim - 1))
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(),
        collapsed_slice_dims=(len(rows),),
        start_index_map=(len(rows),),
        operand_batching_dims=rows,
        start_indices_batching_dims=rows,
    )
    return lax.gather(
        x,
        lax.expand_dims(indices, (indices.ndim,)),
        numbers,
        slice_sizes=(1,) * x.ndim,
        mode="promise_in_bounds",
    )


def expand(
    values: Shaped[Array, "*rows k"], words: UInt32[Array, "*rows words"], size: int
) -> Shaped[Array, "*rows {size}"]:
    """Returns chunks with values at the set bits, in order, and zero elsewhere."""
    places = jnp.minimum(
        bit_vectors.count_before_bits(words, bit_vectors.count_before_words(words)),
        values.shape[-1] - 1,
    )
    found = take(values, last_axis.merge(places, words.ndim, size))
    return lax.select(bit_vectors.to_mask(words, size), found, lax.full_like(found, 0))


def scatter(
    values: Shaped[Array, "*rows k"], indices: Integer[Array, "*rows k"], size: int
) -> Shaped[Array, "*rows {size}"]:
    """Returns chunks with values at their indices and zero elsewhere.

    `(*rows, k) -> (*rows, size)`. Indices are not checked: they must be distinct and
    below `size`.
    """

    def row(values: Array, indices: Array) -> Array:
        zeros = jnp.zeros(size, values.dtype)
        return zeros.at[indices].set(values, mode="promise_in_bounds")

    # `jax.vmap`, unlike `jnp.put_along_axis`, marks the leading axes as batch axes,
    # which XLA leaves on their devices.
    for _ in values.shape[:-1]:
        row = jax.vmap(row)
    return row(values, indices)


def _kth_largest(
    scores: Int[Array, "..."], lead: int, k: Int[np.ndarray, "*#chunks"]
) -> tuple[Int[Array, "*rows"], Int[Array, "*rows"]]:
    """Returns each chunk's k-th largest score, and the number of equal ones to keep.

    The score is built from its highest bit down: a bit is set if at least k scores are
    then no less. The last rejected candidate is the score plus 1, so its count is the
    number of scores above the k-th largest.

    Args:
      scores: chunks of several axes, `(*rows, *chunk)`.
      lead: the number of axes before the axes of a chunk.
      k: as in `largest_words`.
    """
    none = lax.full_like(scores, 0, shape=scores.shape[:lead])
    none = shardings.reshard(none, shardings.explicit_spec(scores)[:lead])
    axes = tuple(range(lead, scores.ndim))

    def k_of_each() -> Array:  # made inside the loop: it is no operand of it
        return last_axis.broadcast_to_rows(
            np.broadcast_to(k, none.shape[-1:]), none.astype(jnp.int32)
        )

    def next_bit(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        bit, kth, above = state
        candidate = kth | bit
        counted = scores >= last_axis.repeat_in_blocks(candidate, *scores.shape[lead:])
        count = jnp.sum(counted, axis=axes, dtype=jnp.int32)
        enough = count >= k_of_each()
        kth = lax.select(enough, candidate, kth)
        return bit >> 1, kth, lax.select(enough, above, count)

    highest = scores.dtype.type(1 << (8 * scores.dtype.itemsize - 2))
    state = (jnp.asarray(highest), none, none.astype(jnp.int32))
    _, kth, above = lax.while_loop(lambda state: state[0] > 0, next_bit, state)
    return kth, k_of_each() - above


def _word_of_each(before: Int[Array, "*rows words"], k: int) -> Int[Array, "*rows {k}"]:
    """Returns the word of each of the first k set bits, found by bisection.

    Args:
      before: the number of bits that are set before each word.
      k: the number of set bits to find in a chunk.
    """
    last = before.shape[-1] - 1

    def next_bit(state: tuple[Array, Array]) -> tuple[Array, Array]:
        bit, word = state
        candidate = jnp.minimum(word + bit, last)
        reached = take(before, candidate) <= _iota(word)
        return bit >> 1, lax.select(reached, candidate, word)

    highest = jnp.asarray((1 << last.bit_length()) >> 1, jnp.int32)
    first = lax.full_like(before, 0, shape=(*before.shape[:-1], k))
    state = (highest, shardings.reshard_like(first, before))
    return lax.while_loop(lambda state: state[0] > 0, next_bit, state)[1]


def _iota(like: Shaped[Array, "*rows n"]) -> Int[Array, "*rows n"]:
    """Returns 0, 1, 2, ... in each row, in the shape and sharding of an array."""
    numbers = lax.broadcasted_iota(jnp.int32, like.shape, like.ndim - 1)
    return shardings.reshard_like(numbers, like)
