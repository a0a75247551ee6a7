"""Stores the positions of kept elements, as indices in their chunks or as a bit mask.

`encode` returns the kept values of a tensor in rows, chunk after chunk, and their
positions; `decode` puts the values back. `kernels` encodes the chunks that it supports,
by GPU kernels on an NVIDIA GPU and by plain JAX elsewhere; this module all others.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt8

from dropit_jax.policy import DropIT
from dropit_jax.storage import chunking, packing
from dropit_jax.storage.chunking import Chunking
from dropit_jax.storage.kernels import chunk_storage, dispatch
from dropit_jax.storage.selection import elements
from dropit_jax.xla import barriers, cpu_calls, shardings
from dropit_jax.xla.platforms import by_platform


def choose_encoding(chunks: Chunking, dropit: DropIT) -> Literal["index", "bitmap"]:
    """Returns how positions are stored: one index per kept element, or a bit mask.

    With `"auto"`, the encoding of fewer bytes; the index if both take the same.
    """
    if dropit.encoding != "auto":
        return dropit.encoding
    by_index = packing.packed_size(_kept(chunks, dropit), _index_bits(chunks.size))
    by_bitmap = packing.packed_size(chunks.row_size, 1)
    return "bitmap" if by_bitmap < by_index else "index"


def encode(
    x: Array,
    chunks: Chunking,
    dropit: DropIT,
    scores: Array | None,
    value_dtype: jax.typing.DTypeLike,
) -> tuple[Array, Array]:
    """Returns the kept values, `(*rows, kept)`, and their positions, `(*rows, stored)`.

    With 2 elements kept of every 16, rows of 32 elements have 4 values, and their
    indices of 4 bits take 2 bytes.

    Args:
      x: shape `(*rows, row_size)`.
      chunks: how a row is cut.
      dropit: the policy.
      scores: integers that rank the elements, not negative; `None`: their magnitudes.
      value_dtype: the floating dtype of the kept values.
    """
    kernel_storage = _kernel_storage(chunks, dropit, value_dtype)
    shards = shardings.shards(x, -1) if x.ndim else 1
    if (
        kernel_storage is not None
        and scores is None
        and chunk_storage.supported(x.dtype, kernel_storage)
        and chunks.count // kernel_storage.unit % shards == 0
    ):
        units = _split_units(x, chunks.count // kernel_storage.unit)
        values, positions = dispatch.compress(units, kernel_storage)
        return _merge_units(values), _merge_units(positions)
    return _encode_any(x, scores, chunks, dropit, jnp.dtype(value_dtype))


def decode(
    values: Array,
    positions: Array,
    chunks: Chunking,
    dropit: DropIT,
    dtype: jax.typing.DTypeLike,
    after: Array | None = None,
) -> Array:
    """Returns an array with the kept values at their positions and zero elsewhere.

    Args:
      values: kept values, shape `(*rows, kept)`.
      positions: positions of these values, as `encode` returns them.
      chunks: how a row is cut.
      dropit: the policy that `encode` was given.
      dtype: dtype of the result.
      after: as in `Residual.decompress`.

    Returns:
      The rows, of shape `(*rows, row_size)`.
    """
    kernel_storage = _kernel_storage(chunks, dropit, values.dtype)
    if kernel_storage is not None and chunk_storage.supported(dtype, kernel_storage):
        count = chunks.count // kernel_storage.unit
        if all(count % shardings.shards(x, -1) == 0 for x in (values, positions)):
            units = _split_units(values, count), _split_units(positions, count)
            whole = dispatch.decompress(*units, kernel_storage, dtype, after)
            return chunking.keep_rows_whole(_merge_units(whole), chunks)
    decode_rows = functools.partial(
        _decode_any, chunks=chunks, dropit=dropit, dtype=jnp.dtype(dtype)
    )
    rows = barriers.call_after(after, decode_rows, values, positions)
    return chunking.keep_rows_whole(rows, chunks)


def _kernel_storage(
    chunks: Chunking, dropit: DropIT, value_dtype: jax.typing.DTypeLike
) -> chunk_storage.ChunkStorage | None:
    """Returns the task of a GPU kernel, or `None` if no kernel supports these chunks.

    Kernels take whole chunks, in units whose positions fill whole bytes.
    """
    if dropit.selection != "auto" or chunks.tail or not chunks.count:
        return None
    candidate = chunk_storage.ChunkStorage(
        size=chunks.size,
        kept=dropit.kept(chunks.size),
        encoding=choose_encoding(chunks, dropit),
        value_dtype=jnp.dtype(value_dtype).name,
    )
    whole = (
        chunk_storage.supported("float32", candidate)
        and chunks.count % candidate.unit == 0
    )
    return candidate if whole else None


def _split_units(x: Array, units: int) -> Array:
    """Reshapes `(*rows, n) -> (*rows, units, n // units)`."""
    return x.reshape(*x.shape[:-1], units, x.shape[-1] // units)


def _merge_units(x: Array) -> Array:
    """Inverts `_split_units`."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


# `jax.jit` caches its trace: layers of one shape are traced once.
@functools.partial(
    jax.jit, static_argnames=("chunks", "dropit", "value_dtype"), inline=True
)
def _encode_any(
    x: Array,
    scores: Array | None,
    chunks: Chunking,
    dropit: DropIT,
    value_dtype: jnp.dtype,
) -> tuple[Array, Array]:
    """Returns `encode` of chunks of any size, computed without GPU kernels."""
    encode_plain = functools.partial(
        _encode_plain, chunks=chunks, dropit=dropit, value_dtype=value_dtype
    )
    operands = (x,) if scores is None else (x, scores)
    in_call = cpu_calls.not_inlined(encode_plain)
    results: tuple[Array, Array] = by_platform(encode_plain, cpu=in_call)(*operands)
    return results


def _encode_plain(
    x: Array,
    scores: Array | None = None,
    *,
    chunks: Chunking,
    dropit: DropIT,
    value_dtype: jnp.dtype,
) -> tuple[Array, Array]:
    """Returns `_encode_any`, computed by the same code on every platform."""
    encoder = (
        _encode_bitmap
        if choose_encoding(chunks, dropit) == "bitmap"
        else _encode_indices
    )
    values, positions = encoder(x, scores, chunks, dropit)
    return values.astype(value_dtype), positions


@functools.partial(jax.jit, static_argnames=("chunks", "dropit", "dtype"), inline=True)
def _decode_any(
    values: Array,
    positions: Array,
    chunks: Chunking,
    dropit: DropIT,
    dtype: jnp.dtype,
) -> Array:
    """Returns `decode` of chunks of any size, computed without GPU kernels."""
    place = (
        _decode_bitmap
        if choose_encoding(chunks, dropit) == "bitmap"
        else _decode_indices
    )
    return place(values.astype(dtype), positions, chunks, dropit)


def _kept(chunks: Chunking, dropit: DropIT) -> int:
    """Returns the number of kept elements of a row."""
    return sum(count * size for count, size in _kept_segments(chunks, dropit))


def _kept_segments(chunks: Chunking, dropit: DropIT) -> tuple[tuple[int, int], ...]:
    """Returns (number of chunks, kept elements of each) for each segment."""
    return tuple((count, dropit.kept(size)) for count, size in chunks.segments)


def _index_bits(chunk_size: int) -> int:
    """Returns the bits of the smallest index type that addresses a chunk."""
    for bits in (4, 8, 16):
        if chunk_size <= 2**bits:
            return bits
    return 32


def _split_with_scores(
    x: Array, scores: Array | None, chunks: Chunking
) -> list[tuple[Array, Array | None]]:
    """Splits rows into segments, each with the scores of its elements."""
    segments = chunking.split(x, chunks.segments)
    if scores is None:
        return [(segment, None) for segment in segments]
    return list(zip(segments, chunking.split(scores, chunks.segments), strict=True))


def _encode_indices(
    x: Array, scores: Array | None, chunks: Chunking, dropit: DropIT
) -> tuple[Array, Array]:
    selected = [
        elements.top_k(s, dropit.kept(s.shape[-1]), dropit.selection, ranked)
        for s, ranked in _split_with_scores(x, scores, chunks)
    ]
    values = chunking.join([values for values, _ in selected])
    indices = chunking.join([indices for _, indices in selected])
    bits = _index_bits(chunks.size)
    if bits == 4:
        return values, packing.pack(indices, bits)
    return values, indices.astype(jnp.int32 if bits == 32 else f"uint{bits}")


def _decode_indices(
    values: Array, positions: Array, chunks: Chunking, dropit: DropIT
) -> Array:
    if _index_bits(chunks.size) == 4:
        positions = packing.unpack(positions, 4, _kept(chunks, dropit))
    kept = _kept_segments(chunks, dropit)
    return chunking.join(
        [
            elements.place(v, p, size)
            for v, p, (_, size) in zip(
                chunking.split(values, kept),
                chunking.split(positions, kept),
                chunks.segments,
                strict=True,
            )
        ]
    )


def _encode_bitmap(
    x: Array, scores: Array | None, chunks: Chunking, dropit: DropIT
) -> tuple[Array, UInt8[Array, "*rows bytes"]]:
    if dropit.selection == "auto" and _has_large_chunks(chunks):
        kept = [k for _, k in _kept_segments(chunks, dropit)]
        return elements.top_k_bitmap(x, chunks.segments, kept, scores)
    mask = chunking.join(
        [
            elements.top_k_mask(s, dropit.kept(s.shape[-1]), dropit.selection, ranked)
            for s, ranked in _split_with_scores(x, scores, chunks)
        ]
    )
    segments, kept_segments = _compaction_segments(chunks, dropit)
    values = [
        elements.compact(segment, under, k)
        for segment, under, (_, k) in zip(
            chunking.split(x, segments),
            chunking.split(mask, segments),
            kept_segments,
            strict=True,
        )
    ]
    return chunking.join(values), packing.pack(mask, 1)


def _decode_bitmap(
    values: Array, positions: Array, chunks: Chunking, dropit: DropIT
) -> Array:
    if _has_large_chunks(chunks):
        return elements.expand_bitmap(values, positions, chunks.segments)
    mask = packing.unpack(positions, 1, chunks.row_size).astype(bool)
    return chunking.join(
        [
            elements.expand(v, m)
            for v, m in zip(
                chunking.split(values, _kept_segments(chunks, dropit)),
                chunking.split(mask, chunks.segments),
                strict=True,
            )
        ]
    )


def _compaction_segments(
    chunks: Chunking, dropit: DropIT
) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    """Returns the segments to compact, and (number of chunks, k) for each segment.

    Large chunks are compacted as one chunk per row: kept elements are in the order of
    their indices anyway, and the cost does not depend on the size of a chunk. For rows
    of 2 chunks of 100 elements, 25 of each kept: `((1, 200),), ((1, 50),)`.
    """
    if _has_large_chunks(chunks):
        return ((1, chunks.row_size),), ((1, _kept(chunks, dropit)),)
    return chunks.segments, _kept_segments(chunks, dropit)


def _has_large_chunks(chunks: Chunking) -> bool:
    """Returns whether there are whole chunks of more than `MAX_SMALL` elements."""
    return chunks.count > 0 and chunks.size > elements.MAX_SMALL
