"""Exact selection in chunks of any size, without sorting.

The k-th largest score is found by bisection on its bits. Where the kept elements are is
then a bit vector, and what has to be known of it are ranks: how many bits are set
before each, and where the j-th set one is. Words of 32 bits answer both: a prefix sum
over the words, which are few, and counts of bits within one.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int, Integer, Shaped, UInt32

from dropit_jax import shardings

# Scores are searched in digits of so many bits: the smaller the type, the more of them
# a vector instruction of a CPU compares.
_DIGIT = 16
# What brings an unsigned digit into the range of a signed one.
_OFFSET = 2 ** (_DIGIT - 1)

# Elements are counted down columns of at most `_ROWS`, in parallel and in bytes, and
# the columns' counts are added up: much faster on a CPU than one sum along a row.
_COLUMNS = 1024
_ROWS = 255

_WORD = 32


def largest(
    scores: Int[Array, "*rows size"], k: int | Int[np.ndarray, "chunks"]
) -> Bool[Array, "*rows size"]:
    """Where the k largest of each chunk are, ties to the lower index.

    Args:
      scores: not negative.
      k: how many of each chunk, or of each chunk of a row.
    """
    missing = jnp.zeros_like(scores[..., :1], dtype=jnp.int32)
    missing += np.asarray(k, np.int32)[..., None]
    tied = jnp.ones_like(scores, dtype=bool)
    above = jnp.zeros_like(scores, dtype=bool)
    for shift in reversed(range(0, 8 * scores.dtype.itemsize, _DIGIT)):
        # Of elements that are out already the digit is 0, which is never counted.
        digit = jnp.where(tied, (scores >> shift) & (2 * _OFFSET - 1), 0)
        digit = digit.astype(jnp.int32)
        counted = _columns((digit - _OFFSET).astype(jnp.int16))
        kth = _kth_largest(counted, missing)
        missing -= _count(counted, kth + 1)
        above |= digit > kth
        tied &= digit == kth
    return above | (tied & (rank(tied) < missing))


def rank(mask: Bool[Array, "*rows size"]) -> Int[Array, "*rows size"]:
    """How many elements of its chunk are under the mask before each."""
    words = _words(mask)
    earlier = jnp.asarray((1 << np.arange(_WORD, dtype=np.int64)) - 1, jnp.uint32)
    within = lax.population_count(words[..., None] & earlier).astype(jnp.int32)
    ranks = _before(words)[..., None] + within
    ranks = ranks.reshape(*mask.shape[:-1], words.shape[-1] * _WORD)
    return ranks[..., : mask.shape[-1]]


def select(mask: Bool[Array, "*rows size"], k: int) -> Int[Array, "*rows {k}"]:
    """The indices of the first k elements under the mask, in their order.

    Args:
      mask: of at least k elements in each chunk.
      k: how many.
    """
    words = _words(mask)
    before = _before(words)
    # Each word that is not empty writes its number to where its first bit goes; what
    # is in between are the other bits of the last such word.
    first = jnp.where(words == 0, k, before)
    numbers = lax.broadcasted_iota(jnp.int32, first.shape, first.ndim - 1)
    numbers = shardings.like(numbers, first)
    starts = scatter(numbers, first, k + 1)[..., :k]
    word = lax.cummax(starts, axis=starts.ndim - 1)
    bit = jnp.arange(k) - take(before, word)
    return word * _WORD + _nth_bit(take(words, word), bit)


def take(x: Shaped[Array, "*rows size"], indices: Int[Array, "*rows k"]) -> Array:
    """The elements of each chunk at its indices."""

    def row(x: Array, indices: Array) -> Array:
        return x.at[indices].get(mode="promise_in_bounds")

    for _ in x.shape[:-1]:
        row = jax.vmap(row)
    return row(x, indices)


def expand(
    values: Shaped[Array, "*rows k"], mask: Bool[Array, "*rows size"]
) -> Shaped[Array, "*rows size"]:
    """Values, in the order of the mask, under it, and zero elsewhere."""
    places = jnp.minimum(rank(mask), values.shape[-1] - 1)
    return jnp.where(mask, take(values, places), 0)


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


def _columns(digits: Int[Array, "*rows size"]) -> Int[Array, "*rows length columns"]:
    """Digits in columns, the last filled up with what is never counted."""
    size = digits.shape[-1]
    columns = min(_COLUMNS, -(-size // 16))
    length = -(-size // columns)
    lead = digits.shape[:-1]
    if missing := length * columns - size:
        fill = [(0, 0)] * len(lead) + [(0, missing)]
        digits = jnp.pad(digits, fill, constant_values=-_OFFSET)
    return digits.reshape(*lead, length, columns)


def _count(
    digits: Int[Array, "*rows length columns"], least: Int[Array, "*rows 1"]
) -> Int[Array, "*rows 1"]:
    """How many digits are at least `least`, which is positive."""
    counted = digits >= (least - _OFFSET).astype(digits.dtype)[..., None]
    count_type = jnp.uint8 if digits.shape[-2] <= _ROWS else jnp.int32
    down = jnp.sum(counted, axis=-2, dtype=count_type)
    return jnp.sum(down, axis=-1, keepdims=True, dtype=jnp.int32)


def _kth_largest(
    digits: Int[Array, "*rows length columns"], k: Int[Array, "*rows 1"]
) -> Int[Array, "*rows 1"]:
    """The k-th largest digit of each chunk, bit by bit from the highest.

    A bit belongs to it if at least k digits are no less with the bit set.
    """

    def next_bit(i: Array, kth: Array) -> Array:
        candidate = kth | (jnp.int32(1) << (_DIGIT - 1 - i))
        return jnp.where(_count(digits, candidate) >= k, candidate, kth)

    return lax.fori_loop(0, _DIGIT, next_bit, jnp.zeros_like(k))


def _words(mask: Bool[Array, "*rows size"]) -> UInt32[Array, "*rows words"]:
    """The mask in words of 32 bits, the first element in the lowest bit."""
    lead, missing = mask.shape[:-1], -mask.shape[-1] % _WORD
    if missing:
        mask = jnp.pad(mask, [(0, 0)] * len(lead) + [(0, missing)])
    bits = mask.reshape(*lead, mask.shape[-1] // _WORD, _WORD).astype(jnp.uint32)
    places = jnp.arange(_WORD, dtype=jnp.uint32)
    return jnp.sum(bits << places, axis=-1, dtype=jnp.uint32)


def _before(words: UInt32[Array, "*rows words"]) -> Int[Array, "*rows words"]:
    """How many bits are set before each word."""
    count = lax.population_count(words).astype(jnp.int32)
    return jnp.cumsum(count, axis=-1) - count


def _nth_bit(
    word: UInt32[Array, "*shape"], n: Int[Array, "*shape"]
) -> Int[Array, "*shape"]:
    """The place of the n-th set bit of a word, counted from 0; by halves."""
    place, n = jnp.zeros_like(n), n.astype(jnp.int32)
    for half in (16, 8, 4, 2, 1):
        low = lax.population_count(word & np.uint32((1 << half) - 1)).astype(jnp.int32)
        above = n >= low
        n = jnp.where(above, n - low, n)
        word = jnp.where(above, word >> half, word)
        place += jnp.where(above, half, 0)
    return place
