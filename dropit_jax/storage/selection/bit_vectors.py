"""Stores bit masks in words of 32 bits, to count the bits set before each bit.

A count is a prefix sum over words, which are few, plus a count of bits within one word.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int, Shaped, UInt8, UInt32

from dropit_jax.storage import last_axis

# Size of the last of several axes: of a sum over a longer one LLVM makes a long CPU
# program without vector instructions.
_VECTOR = 8

# The first bit of each bit and of each byte of a word.
BITS = np.arange(32, dtype=np.uint32).reshape(-1, _VECTOR)
_BYTES = np.arange(0, 32, 8, dtype=np.uint32)


def word_count(bits: int) -> int:
    """Returns the number of words that hold `bits` bits."""
    return -(-bits // BITS.size)


def to_words(mask: Bool[Array, "*rows size"]) -> UInt32[Array, "*rows words"]:
    """Packs a bit mask, the first element in the lowest bit of a word.

    `(*rows, size) -> (*rows, ceil(size / 32))`: a mask of 40 elements of which 0, 2 and
    33 are set is the words `[0b101, 0b10]`.
    """
    return combine_parts(last_axis.split(mask, *BITS.shape))


def to_mask(
    words: UInt32[Array, "*rows words"], size: int
) -> Bool[Array, "*rows {size}"]:
    """Inverts `to_words`: `(*rows, words) -> (*rows, size)`."""
    bits = _shift(words, BITS) & 1
    return last_axis.merge(bits.astype(bool), words.ndim, size)


def to_bytes(
    words: UInt32[Array, "*rows words"], count: int
) -> UInt8[Array, "*rows {count}"]:
    """Returns the first `count` bytes of the words of a row, the lowest byte first.

    The words `[0b101, 0b10]` are, in 5 bytes, `[5, 0, 0, 0, 2]`.
    """
    return last_axis.merge(_shift(words, _BYTES).astype(jnp.uint8), words.ndim, count)


def from_bytes(
    packed: UInt8[Array, "*rows bytes"], count: int
) -> UInt32[Array, "*rows {count}"]:
    """Inverts `to_bytes`: `(*rows, bytes) -> (*rows, count)`, padded with zeros."""
    packed = last_axis.pad(packed, count * _BYTES.size)
    return combine_parts(last_axis.split(packed, *_BYTES.shape), _BYTES)


def merge_chunks(
    words: UInt32[Array, "*rows chunks words"], size: int, row_size: int
) -> UInt32[Array, "*rows row_words"]:
    """Converts the words of chunks of `size` elements to words of whole rows.

    `(*rows, chunks, words) -> (*rows, row_words)`: 5 chunks of 40 elements have 2 words
    each, and their row of 200 elements has 7. Bits beyond `row_size` must be 0; the
    result may end with words of these zero bits.
    """
    row = words.ndim - 1
    if size % BITS.size == 0:
        return last_axis.merge(words, row)
    return to_words(last_axis.merge(to_mask(words, size), row, row_size))


def combine_parts(
    parts: Shaped[Array, "..."], starts: UInt32[np.ndarray, "..."] = BITS
) -> UInt32[Array, "..."]:
    """Shifts each part of a word to its start and sums the parts.

    `(*rows, words, *parts) -> (*rows, words)`. Parts are bits by default.
    """
    each = parts.astype(jnp.uint32)
    axes = tuple(range(each.ndim - starts.ndim, each.ndim))
    return jnp.sum(
        each << last_axis.broadcast_to_rows(starts, each), axis=axes, dtype=jnp.uint32
    )


def count_before_bits(
    words: UInt32[Array, "*words"], before: Int[Array, "*words"]
) -> Int[Array, "*words 4 8"]:
    """Returns how many bits are set before each bit: `(*words) -> (*words, 4, 8)`.

    Args:
      words: words of bits.
      before: how many bits are set before each word.
    """
    each = last_axis.repeat_in_blocks(words, *BITS.shape)
    earlier = each & last_axis.broadcast_to_rows((1 << BITS) - 1, each)
    within = lax.population_count(earlier).astype(jnp.int32)
    return last_axis.repeat_in_blocks(before, *BITS.shape) + within


def count_before_words(
    words: UInt32[Array, "*rows words"],
) -> Int[Array, "*rows words"]:
    """Returns how many bits of the row are set before each word.

    For the words `[0b101, 0b10]`: `[0, 2]`.
    """
    return _prefix_sum(lax.population_count(words).astype(jnp.int32))


def nth_bit(
    word: UInt32[Array, "*shape"], n: Int[Array, "*shape"]
) -> Int[Array, "*shape"]:
    """Returns the position of the n-th set bit of a word, counted from 0.

    For the word `0b10110` and n = 1: 2.
    """
    each = last_axis.repeat_in_blocks(word, *BITS.shape)
    through = each & last_axis.broadcast_to_rows((2 << BITS) - 1, each)
    count = lax.population_count(through).astype(jnp.int32)
    earlier = count <= last_axis.repeat_in_blocks(n, *BITS.shape)
    return jnp.sum(earlier, axis=(-2, -1), dtype=jnp.int32)


def _shift(
    words: UInt32[Array, "*rows words"], starts: UInt32[np.ndarray, "*parts"]
) -> UInt32[Array, "..."]:
    """Shifts each word right by each start: `(*words) -> (*words, *parts)`.

    Bits of higher parts are not removed.
    """
    each = last_axis.repeat_in_blocks(words, *starts.shape)
    return each >> last_axis.broadcast_to_rows(starts, each)


def _prefix_sum(x: Int[Array, "*rows n"]) -> Int[Array, "*rows n"]:
    """Returns the sum of the elements before each, along the last axis.

    Sums are taken within blocks of at most 64 elements, then over the blocks' totals.
    """
    n = x.shape[-1]
    length = min(_VECTOR, -(-n // _VECTOR)) * _VECTOR
    parts = last_axis.split(x, length // _VECTOR, _VECTOR)
    *rows, count, _, _ = parts.shape
    # Broadcast each block to (length + 1, *block). Row i of the mask keeps the elements
    # before element i, for x & -1 is x and x & 0 is 0; the last row keeps all of them,
    # for the block's total.
    shape = (*rows, count, length + 1, *parts.shape[-2:])
    lead = len(rows) + 1
    each = lax.broadcast_in_dim(parts, shape, (*range(lead), lead + 1, lead + 2))
    earlier = np.tril(np.full((length + 1, length), -1, np.int32), -1)
    mask = last_axis.broadcast_to_rows(earlier.reshape(shape[-3:]), each)
    sums = jnp.sum(each & mask, axis=(-2, -1), dtype=jnp.int32)
    before = lax.slice_in_dim(sums, 0, length, axis=lead)
    if count > 1:
        totals = lax.index_in_dim(sums, length, lead, keepdims=False)
        before += last_axis.repeat_in_blocks(_prefix_sum(totals), length)
    return last_axis.merge(before, x.ndim, n)
