"""Bit vectors, in words of 32 bits.

A prefix sum over the words, which are few, and counts of bits within one say how many
bits are set before each.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int, Shaped, UInt8, UInt32

from dropit_jax.storage import last_axis

# Where the bits of a word begin, and its bytes. The last of several axes has so many
# elements: from a sum over more of them LLVM makes long programs for a CPU, without
# vector instructions.
_VECTOR = 8
BITS = np.arange(32, dtype=np.uint32).reshape(-1, _VECTOR)
_BYTES = np.arange(0, 32, 8, dtype=np.uint32)


def word_count(bits: int) -> int:
    """Words that hold so many bits."""
    return -(-bits // BITS.size)


def to_words(mask: Bool[Array, "*rows size"]) -> UInt32[Array, "*rows words"]:
    """A mask in words of 32 bits, the first element in the lowest bit."""
    return join(last_axis.split(mask, *BITS.shape))


def to_mask(
    words: UInt32[Array, "*rows words"], size: int
) -> Bool[Array, "*rows {size}"]:
    """The inverse of `to_words`."""
    bits = _apart(words, BITS) & 1
    return last_axis.merge(bits.astype(bool), words.ndim, size)


def to_bytes(
    words: UInt32[Array, "*rows words"], count: int
) -> UInt8[Array, "*rows {count}"]:
    """The first bytes of words, the lowest first."""
    return last_axis.merge(_apart(words, _BYTES).astype(jnp.uint8), words.ndim, count)


def from_bytes(
    packed: UInt8[Array, "*rows bytes"], count: int
) -> UInt32[Array, "*rows {count}"]:
    """The inverse of `to_bytes`, with so many words: enough, or more."""
    packed = last_axis.pad(packed, count * _BYTES.size)
    return join(last_axis.split(packed, *_BYTES.shape), _BYTES)


def in_rows(
    words: UInt32[Array, "*rows chunks words"], size: int, row_size: int
) -> UInt32[Array, "*rows row_words"]:
    """Words of chunks of `size` elements as those of rows.

    Of elements beyond the `row_size` of a row, which may have words, no bit is set.
    """
    row = words.ndim - 1
    if size % BITS.size == 0:
        return last_axis.merge(words, row)
    return to_words(last_axis.merge(to_mask(words, size), row, row_size))


def join(
    parts: Shaped[Array, "..."], starts: UInt32[np.ndarray, "..."] = BITS
) -> UInt32[Array, "..."]:
    """Words of their parts: (*rows, words, *parts) to (*rows, words)."""
    each = parts.astype(jnp.uint32)
    axes = tuple(range(each.ndim - starts.ndim, each.ndim))
    return jnp.sum(each << last_axis.along(starts, each), axis=axes, dtype=jnp.uint32)


def rank(
    words: UInt32[Array, "*words"], before: Int[Array, "*words"]
) -> Int[Array, "*words 4 8"]:
    """How many bits are set before each.

    Args:
      words: bits.
      before: how many are set before each word.
    """
    each = last_axis.spread(words, *BITS.shape)
    earlier = each & last_axis.along((1 << BITS) - 1, each)
    within = lax.population_count(earlier).astype(jnp.int32)
    return last_axis.spread(before, *BITS.shape) + within


def set_before(words: UInt32[Array, "*rows words"]) -> Int[Array, "*rows words"]:
    """How many bits are set before each word."""
    return _sums_before(lax.population_count(words).astype(jnp.int32))


def nth_bit(
    word: UInt32[Array, "*shape"], n: Int[Array, "*shape"]
) -> Int[Array, "*shape"]:
    """The place of the n-th set bit of a word, counted from 0."""
    each = last_axis.spread(word, *BITS.shape)
    through = each & last_axis.along((2 << BITS) - 1, each)
    count = lax.population_count(through).astype(jnp.int32)
    earlier = count <= last_axis.spread(n, *BITS.shape)
    return jnp.sum(earlier, axis=(-2, -1), dtype=jnp.int32)


def _apart(
    words: UInt32[Array, "*rows words"], starts: UInt32[np.ndarray, "*parts"]
) -> UInt32[Array, "..."]:
    """Words, shifted to the start of each of their parts."""
    each = last_axis.spread(words, *starts.shape)
    return each >> last_axis.along(starts, each)


def _sums_before(x: Int[Array, "*rows n"]) -> Int[Array, "*rows n"]:
    """The sum of the elements before each: in blocks, and of blocks' sums again."""
    n = x.shape[-1]
    length = min(_VECTOR, -(-n // _VECTOR)) * _VECTOR
    parts = last_axis.split(x, length // _VECTOR, _VECTOR)
    *rows, count, _, _ = parts.shape
    # To each element its block, and of that, by their bits, those before the element;
    # and once more all of them.
    shape = (*rows, count, length + 1, *parts.shape[-2:])
    lead = len(rows) + 1
    each = lax.broadcast_in_dim(parts, shape, (*range(lead), lead + 1, lead + 2))
    earlier = np.tril(np.full((length + 1, length), -1, np.int32), -1)
    mask = last_axis.along(earlier.reshape(shape[-3:]), each)
    sums = jnp.sum(each & mask, axis=(-2, -1), dtype=jnp.int32)
    before = lax.slice_in_dim(sums, 0, length, axis=lead)
    if count > 1:
        totals = lax.index_in_dim(sums, length, lead, keepdims=False)
        before += last_axis.spread(_sums_before(totals), length)
    return last_axis.merge(before, x.ndim, n)
