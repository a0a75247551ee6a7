"""Selects the kept elements of a chunk by exact top-k along the last axis.

Every method keeps the elements of `lax.top_k(abs(x), k)`: the largest magnitudes, ties
to the lower index, NaN above infinity. Methods differ in how XLA compiles them and, on
large chunks, in the order of the kept elements. A random sample is the top-k of random
scores.

Chunks of at most `MAX_SMALL` elements are selected by comparisons that fuse
(`small_chunks`), larger ones by bisection (`large_chunks`). Both leave sharded data on
its devices; `lax.top_k` makes XLA gather the chunks on every device.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Integer, Shaped, UInt8

from dropit_jax.policy import Selection
from dropit_jax.storage import last_axis
from dropit_jax.storage.selection import bit_vectors, large_chunks, small_chunks
from dropit_jax.storage.shapes import Shape

# The largest chunk selected by comparisons; in larger ones bisection costs less.
MAX_SMALL = 64


def top_k(
    x: Float[Array, "*rows size"],
    k: int,
    selection: Selection = "auto",
    scores: Int[Array, "*rows size"] | None = None,
) -> tuple[Float[Array, "*rows {k}"], Int[Array, "*rows {k}"]]:
    """Returns the k elements of largest magnitude of each chunk, and their indices.

    `(*rows, size) -> (*rows, k)`.

    Args:
      x: chunks.
      k: how many elements of each chunk to keep.
      selection: `"top_k"` uses `lax.top_k`; any other value uses the method for chunks
        of this size.
      scores: numbers that rank the elements instead of their magnitudes, not negative.

    Returns:
      The signed elements and their indices, largest first. Chunks of more than
      `MAX_SMALL` elements have them in the order of their indices instead, which needs
      no sorting, unless `selection` is `"top_k"`.
    """
    if selection == "top_k":
        indices = lax.top_k(jnp.abs(x) if scores is None else scores, k)[1]
        return jnp.take_along_axis(x, indices, axis=-1), indices
    if x.shape[-1] > MAX_SMALL:
        ranked = magnitude(x) if scores is None else scores
        indices = large_chunks.indices_of_set_bits(
            large_chunks.largest_words(ranked, k), k
        )
        return large_chunks.take(x, indices), indices
    if scores is None:
        values, indices_by_rank = small_chunks.top_k_of_magnitudes(x, k)
        return values, small_chunks.stack(indices_by_rank).astype(jnp.int32)
    return small_chunks.top_k(x, scores, k)


def top_k_mask(
    x: Float[Array, "*rows size"],
    k: int,
    selection: Selection = "auto",
    scores: Int[Array, "*rows size"] | None = None,
) -> Bool[Array, "*rows size"]:
    """Returns whether each element is one of the k of largest magnitude.

    The arguments and the selected elements are those of `top_k`.
    """
    if selection == "top_k":
        indices = lax.top_k(jnp.abs(x) if scores is None else scores, k)[1]
        ones = jnp.ones(indices.shape, bool)
        return large_chunks.scatter(ones, indices, x.shape[-1])
    scores = magnitude(x) if scores is None else scores
    if x.shape[-1] > MAX_SMALL:
        return bit_vectors.to_mask(large_chunks.largest_words(scores, k), x.shape[-1])
    return small_chunks.largest_mask(scores, k)


def top_k_bitmap(
    x: Shaped[Array, "*rows size"],
    segments: Sequence[tuple[int, int]],
    kept: Sequence[int],
    scores: Int[Array, "*rows size"] | None = None,
) -> tuple[Shaped[Array, "*rows kept"], UInt8[Array, "*rows bytes"]]:
    """Returns the kept elements and the bit mask of rows of large chunks.

    One bisection serves all chunks of a row, also a shorter last one.

    Args:
      x: rows of chunks.
      segments: (number, size) of the chunks of a row, as `Chunking.segments`.
      kept: how many elements of a chunk to keep, for each segment.
      scores: as in `top_k`.

    Returns:
      The elements, in the order of their indices, and a bit for each element of a row:
      `(*rows, 200) -> (*rows, kept), (*rows, 25)`.
    """
    ranked = magnitude(x) if scores is None else scores
    *rows, row_size = x.shape
    counts, sizes = zip(*segments, strict=True)
    count, size = sum(counts), sizes[0]
    # Zeros at the end lose every tie, so that no padding is among the largest.
    ranked = last_axis.pad(ranked, count * size)
    chunks = ranked.reshape(*rows, count, size)
    words = large_chunks.largest_words(chunks, np.repeat(kept, counts))
    words = bit_vectors.merge_chunks(words, size, row_size)
    of_row = sum(number * k for number, k in zip(counts, kept, strict=True))
    indices = large_chunks.indices_of_set_bits(words, of_row)
    bitmap = bit_vectors.to_bytes(words, -(-row_size // 8))
    return large_chunks.take(x, indices), bitmap


def expand_bitmap(
    values: Shaped[Array, "*rows kept"],
    bitmap: UInt8[Array, "*rows bytes"],
    segments: Sequence[tuple[int, int]],
) -> Shaped[Array, "*rows size"]:
    """Inverts `top_k_bitmap`: rows with elements at their positions, else zero."""
    counts, sizes = zip(*segments, strict=True)
    row_size = sum(count * size for count, size in segments)
    # As many words as in `top_k_bitmap`.
    number = bit_vectors.word_count(sum(counts) * sizes[0])
    words = bit_vectors.from_bytes(bitmap, number)
    return large_chunks.expand(values, words, row_size)


def random_scores(key: Array, shape: Shape) -> Int[Array, "*shape"]:
    """Returns scores whose top-k is a uniform sample.

    Two scores are equal with a probability of 2**-31; ties are not broken at random.
    """
    return (jax.random.bits(key, shape, jnp.uint32) >> 1).astype(jnp.int32)


def place(
    values: Shaped[Array, "*rows k"], indices: Integer[Array, "*rows k"], size: int
) -> Shaped[Array, "*rows {size}"]:
    """Returns chunks with values at their indices and zero elsewhere.

    Args:
      values: kept elements of each chunk.
      indices: their indices in the chunk, without repetition.
      size: elements of the chunk.
    """
    if size > MAX_SMALL:
        return large_chunks.scatter(values, indices.astype(jnp.int32), size)
    columns = [indices[..., i : i + 1] for i in range(indices.shape[-1])]
    return small_chunks.place(values, columns, size)


def compact(
    x: Shaped[Array, "*rows size"], mask: Bool[Array, "*rows size"], k: int
) -> Shaped[Array, "*rows {k}"]:
    """Returns the k elements under the mask, in the order of their indices.

    For `[1, -5, 2, 4]` under `[0, 1, 0, 1]`: `[-5, 4]`.
    """
    if x.shape[-1] > MAX_SMALL:
        indices = large_chunks.indices_of_set_bits(bit_vectors.to_words(mask), k)
        return large_chunks.take(x, indices)
    return small_chunks.compact(x, mask, k)


def expand(
    values: Shaped[Array, "*rows k"], mask: Bool[Array, "*rows size"]
) -> Shaped[Array, "*rows size"]:
    """Inverts `compact`: values under the mask, zero elsewhere."""
    size = mask.shape[-1]
    if size > MAX_SMALL:
        return large_chunks.expand(values, bit_vectors.to_words(mask), size)
    return small_chunks.expand(values, mask)


def magnitude(x: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Returns the bits of |x| as integers: 1.0 in float32 is 0x3F800000.

    The integers have the order of |x|, with NaN above infinity. They compare exactly
    also where denormal floats are flushed to zero.
    """
    signed = lax.bitcast_convert_type(x, jnp.dtype(f"int{8 * x.dtype.itemsize}"))
    return signed & jnp.iinfo(signed.dtype).max
