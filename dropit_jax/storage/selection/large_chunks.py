"""Exact selection in chunks of any size, without sorting.

The k-th largest score is found by bisection on its bits. Where the kept elements are is
then a bit vector, and what has to be known of it are ranks: how many bits are set
before each, and where the j-th set one is.

XLA's CPU compiler takes as long for a loop of one operation as for one of many, and
goes through all operations of each layer: there are few of both here.
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

# Of a sum over more elements along one axis XLA's CPU compiler makes two loops.
_LONGEST = 32


def largest(
    scores: Int[Array, "*rows size"], k: int | Int[np.ndarray, "chunks"]
) -> UInt32[Array, "*rows words"]:
    """Where the k largest of each chunk are, ties to the lower index.

    Args:
      scores: not negative.
      k: how many of each chunk, or of each chunk of a row.
    """
    size, lead = scores.shape[-1], scores.ndim - 1
    axes = list(bit_vectors.BITS.shape)
    while -(-size // math.prod(axes)) > _LONGEST:
        axes.insert(0, _LONGEST)
    each = last_axis.split(scores, *axes, fill=-1)  # -1 is never among the largest
    kth, missing = _kth_largest(each, lead, np.asarray(k, np.int32))
    kth = last_axis.spread(kth, *each.shape[lead:])
    tied = each == kth
    words = bit_vectors.join(tied)
    before = bit_vectors.set_before(last_axis.merge(words, lead + 1)).reshape(
        words.shape
    )
    first = bit_vectors.rank(words, before) < last_axis.spread(
        missing, *each.shape[lead:]
    )
    kept = bit_vectors.join((each > kth) | (tied & first))
    return last_axis.merge(kept, lead + 1, bit_vectors.word_count(size))


def select(words: UInt32[Array, "*rows words"], k: int) -> Int[Array, "*rows {k}"]:
    """The indices of the first k set bits, in their order.

    Args:
      words: of at least k set bits in each chunk.
      k: how many.
    """
    before = bit_vectors.set_before(words)
    word = _word_of_each(before, k)
    bit = bit_vectors.nth_bit(take(words, word), _iota(word) - take(before, word))
    return word * bit_vectors.BITS.size + bit


def take(
    x: Shaped[Array, "*rows size"], indices: Int[Array, "*rows k"]
) -> Shaped[Array, "*rows k"]:
    """The elements of each chunk at its indices."""
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
    """Values, in the order of the set bits, where these are, and zero elsewhere."""
    places = jnp.minimum(
        bit_vectors.rank(words, bit_vectors.set_before(words)), values.shape[-1] - 1
    )
    found = take(values, last_axis.merge(places, words.ndim, size))
    return lax.select(bit_vectors.to_mask(words, size), found, lax.full_like(found, 0))


def scatter(
    values: Shaped[Array, "*rows k"], indices: Integer[Array, "*rows k"], size: int
) -> Shaped[Array, "*rows {size}"]:
    """Chunks of zeros with values at these indices."""

    def row(values: Array, indices: Array) -> Array:
        zeros = jnp.zeros(size, values.dtype)
        return zeros.at[indices].set(values, mode="promise_in_bounds")

    # `jax.vmap` marks the leading axes as a batch for XLA, which then leaves them on
    # their devices; `jnp.put_along_axis` does not.
    for _ in values.shape[:-1]:
        row = jax.vmap(row)
    return row(values, indices)


def _kth_largest(
    scores: Int[Array, "..."], lead: int, k: Int[np.ndarray, "*#chunks"]
) -> tuple[Int[Array, "*rows"], Int[Array, "*rows"]]:
    """The k-th largest score of each chunk, and which number it has among its equals.

    Bit by bit from the highest: one belongs to it if at least k scores are no less with
    the bit set. The last candidate of which there are fewer is the next above it.

    Args:
      scores: in chunks of several axes.
      lead: how many axes are before those of a chunk.
      k: of each chunk, or of each of a row.
    """
    none = lax.full_like(scores, 0, shape=scores.shape[:lead])
    none = shardings.to(none, shardings.spec(scores)[:lead])
    axes = tuple(range(lead, scores.ndim))

    def wanted() -> Array:  # made where it is needed: no operand of the loop
        return last_axis.along(
            np.broadcast_to(k, none.shape[-1:]), none.astype(jnp.int32)
        )

    def next_bit(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        bit, kth, above = state
        candidate = kth | bit
        counted = scores >= last_axis.spread(candidate, *scores.shape[lead:])
        count = jnp.sum(counted, axis=axes, dtype=jnp.int32)
        enough = count >= wanted()
        kth = lax.select(enough, candidate, kth)
        return bit >> 1, kth, lax.select(enough, above, count)

    highest = scores.dtype.type(1 << (8 * scores.dtype.itemsize - 2))
    state = (jnp.asarray(highest), none, none.astype(jnp.int32))
    _, kth, above = lax.while_loop(lambda state: state[0] > 0, next_bit, state)
    return kth, wanted() - above


def _word_of_each(before: Int[Array, "*rows words"], k: int) -> Int[Array, "*rows {k}"]:
    """The number of the word in which each of the first k set bits is, by bisection.

    Args:
      before: how many bits are set before each word.
      k: how many.
    """
    last = before.shape[-1] - 1

    def next_bit(state: tuple[Array, Array]) -> tuple[Array, Array]:
        bit, word = state
        candidate = jnp.minimum(word + bit, last)
        reached = take(before, candidate) <= _iota(word)
        return bit >> 1, lax.select(reached, candidate, word)

    highest = jnp.asarray((1 << last.bit_length()) >> 1, jnp.int32)
    first = lax.full_like(before, 0, shape=(*before.shape[:-1], k))
    state = (highest, shardings.like(first, before))
    return lax.while_loop(lambda state: state[0] > 0, next_bit, state)[1]


def _iota(like: Shaped[Array, "*rows n"]) -> Int[Array, "*rows n"]:
    """0, 1, 2, ... in each row."""
    numbers = lax.broadcasted_iota(jnp.int32, like.shape, like.ndim - 1)
    return shardings.like(numbers, like)
