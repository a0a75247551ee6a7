"""Where kept elements belong: as indices in their chunks, or as a bitmap.

`encode` gives the kept values of a tensor in rows, chunk after chunk, and their
positions; `decode` puts values back. Whole chunks go by `kernels`, which is plain JAX
too where there is no GPU; all others here.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt8

from dropit_jax.policy import DropIT
from dropit_jax.storage import chunking, packing
from dropit_jax.storage.chunking import Chunking
from dropit_jax.storage.kernels import dispatch, plan
from dropit_jax.storage.selection import elements
from dropit_jax.xla import barriers, calls, shardings
from dropit_jax.xla.platforms import by_platform


def choose(chunks: Chunking, dropit: DropIT) -> Literal["index", "bitmap"]:
    """`"index"` or `"bitmap"`: how positions are stored.

    `"auto"` takes the one of fewer bytes, and of two equal ones the index.
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
    """The kept values and their positions.

    Args:
      x: shape (*rows, row size).
      chunks: how a row is cut.
      dropit: what to keep.
      scores: what to rank elements by; `None`: their magnitude.
      value_dtype: a floating type, that of the kept values.
    """
    by_kernel = _plan(chunks, dropit, value_dtype)
    shards = shardings.shards(x, -1) if x.ndim else 1
    if (
        by_kernel is not None
        and scores is None
        and plan.supported(x.dtype, by_kernel)
        and chunks.count // by_kernel.unit % shards == 0
    ):
        units = _in_units(x, chunks.count // by_kernel.unit)
        values, positions = dispatch.compress(units, by_kernel)
        return _out_of_units(values), _out_of_units(positions)
    return _encode_any(x, scores, chunks, dropit, jnp.dtype(value_dtype))


def decode(
    values: Array,
    positions: Array,
    chunks: Chunking,
    dropit: DropIT,
    dtype: jax.typing.DTypeLike,
    after: Array | None = None,
) -> Array:
    """Kept values in their places, and zero elsewhere.

    Args:
      values: shape (*rows, kept of a row).
      positions: of these values.
      chunks: how a row is cut.
      dropit: what was kept.
      dtype: the result's.
      after: as in `Residual.decompress`.

    Returns:
      The tensor, of shape (*rows, row size).
    """
    by_kernel = _plan(chunks, dropit, values.dtype)
    if by_kernel is not None and plan.supported(dtype, by_kernel):
        count = chunks.count // by_kernel.unit
        if all(count % shardings.shards(x, -1) == 0 for x in (values, positions)):
            units = _in_units(values, count), _in_units(positions, count)
            whole = dispatch.decompress(*units, by_kernel, dtype, after)
            return chunking.whole(_out_of_units(whole), chunks)
    decoded = functools.partial(
        _decode_any, chunks=chunks, dropit=dropit, dtype=jnp.dtype(dtype)
    )
    rows = barriers.computed_after(after, decoded, values, positions)
    return chunking.whole(rows, chunks)


def _plan(
    chunks: Chunking, dropit: DropIT, value_dtype: jax.typing.DTypeLike
) -> plan.Plan | None:
    """What to ask a kernel for; `None` where it takes more than whole chunks."""
    if dropit.selection != "auto" or chunks.tail or not chunks.count:
        return None
    asked = plan.Plan(
        size=chunks.size,
        kept=dropit.kept(chunks.size),
        encoding=choose(chunks, dropit),
        value_dtype=jnp.dtype(value_dtype).name,
    )
    whole = plan.supported("float32", asked) and chunks.count % asked.unit == 0
    return asked if whole else None


def _in_units(x: Array, units: int) -> Array:
    """Cuts the last axis into units."""
    return x.reshape(*x.shape[:-1], units, x.shape[-1] // units)


def _out_of_units(x: Array) -> Array:
    """The inverse of `_in_units`."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


# JAX keeps what it has traced: layers of one shape are traced once, not each.
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
    """`encode` for chunks of any kind."""
    encoded = functools.partial(
        _encoded, chunks=chunks, dropit=dropit, value_dtype=value_dtype
    )
    operands = (x,) if scores is None else (x, scores)
    results: tuple[Array, Array]
    results = by_platform(encoded, cpu=calls.not_inlined(encoded))(*operands)
    return results


def _encoded(
    x: Array,
    scores: Array | None = None,
    *,
    chunks: Chunking,
    dropit: DropIT,
    value_dtype: jnp.dtype,
) -> tuple[Array, Array]:
    """`_encode_any`, in plain operations."""
    to_positions = _to_bitmap if choose(chunks, dropit) == "bitmap" else _to_indices
    values, positions = to_positions(x, scores, chunks, dropit)
    return values.astype(value_dtype), positions


@functools.partial(jax.jit, static_argnames=("chunks", "dropit", "dtype"), inline=True)
def _decode_any(
    values: Array,
    positions: Array,
    chunks: Chunking,
    dropit: DropIT,
    dtype: jnp.dtype,
) -> Array:
    """`decode` for chunks of any kind, in rows."""
    place = _from_bitmap if choose(chunks, dropit) == "bitmap" else _from_indices
    return place(values.astype(dtype), positions, chunks, dropit)


def _kept(chunks: Chunking, dropit: DropIT) -> int:
    """Elements kept of a row."""
    return sum(count * size for count, size in _kept_segments(chunks, dropit))


def _kept_segments(chunks: Chunking, dropit: DropIT) -> tuple[tuple[int, int], ...]:
    return tuple((count, dropit.kept(size)) for count, size in chunks.segments)


def _index_bits(chunk_size: int) -> int:
    """Bits of the smallest index type that addresses a chunk."""
    for bits in (4, 8, 16):
        if chunk_size <= 2**bits:
            return bits
    return 32


def _ranked_segments(
    x: Array, scores: Array | None, chunks: Chunking
) -> list[tuple[Array, Array | None]]:
    """The segments of rows, each with the scores of its elements."""
    segments = chunking.split(x, chunks.segments)
    if scores is None:
        return [(segment, None) for segment in segments]
    return list(zip(segments, chunking.split(scores, chunks.segments), strict=True))


def _to_indices(
    x: Array, scores: Array | None, chunks: Chunking, dropit: DropIT
) -> tuple[Array, Array]:
    picked = [
        elements.top_k(s, dropit.kept(s.shape[-1]), dropit.selection, ranked)
        for s, ranked in _ranked_segments(x, scores, chunks)
    ]
    values = chunking.join([values for values, _ in picked])
    indices = chunking.join([indices for _, indices in picked])
    bits = _index_bits(chunks.size)
    if bits == 4:
        return values, packing.pack(indices, bits)
    return values, indices.astype(jnp.int32 if bits == 32 else f"uint{bits}")


def _from_indices(
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


def _to_bitmap(
    x: Array, scores: Array | None, chunks: Chunking, dropit: DropIT
) -> tuple[Array, UInt8[Array, "*rows bytes"]]:
    if dropit.selection == "auto" and _are_large(chunks):
        kept = [k for _, k in _kept_segments(chunks, dropit)]
        return elements.top_k_bitmap(x, chunks.segments, kept, scores)
    mask = chunking.join(
        [
            elements.top_k_mask(s, dropit.kept(s.shape[-1]), dropit.selection, ranked)
            for s, ranked in _ranked_segments(x, scores, chunks)
        ]
    )
    segments, kept_segments = _compacted(chunks, dropit)
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


def _from_bitmap(
    values: Array, positions: Array, chunks: Chunking, dropit: DropIT
) -> Array:
    if _are_large(chunks):
        return elements.from_bitmap(values, positions, chunks.segments)
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


def _compacted(
    chunks: Chunking, dropit: DropIT
) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    """What is compacted by itself: segments of chunks, and (number, kept) of each.

    The kept elements of a row are in the order of their indices, chunk after chunk. So
    large chunks, whose compaction does not grow with their size, may be one a row.
    """
    if _are_large(chunks):
        return ((1, chunks.row_size),), ((1, _kept(chunks, dropit)),)
    return chunks.segments, _kept_segments(chunks, dropit)


def _are_large(chunks: Chunking) -> bool:
    """Whether there are chunks, and they are searched by `large_chunks`."""
    return chunks.count > 0 and chunks.size > elements.MAX_SMALL
