"""Where kept elements belong: as indices in their chunks, or as a bitmap.

`encode` gives the kept values of a tensor in rows, chunk after chunk, and their
positions; `decode` puts values back.
"""

import jax.numpy as jnp
from jaxtyping import Array, UInt8

from dropit_jax import chunking, packing, selection
from dropit_jax.chunking import Chunking
from dropit_jax.policy import DropIT


def choose(chunks: Chunking, dropit: DropIT) -> str:
    """`"index"` or `"bitmap"`: how positions are stored.

    `"auto"` takes the one of fewer bytes, and of two equal ones the index.
    """
    if dropit.encoding != "auto":
        return dropit.encoding
    by_index = packing.packed_size(_kept(chunks, dropit), _index_bits(chunks.size))
    by_bitmap = packing.packed_size(chunks.row_size, 1)
    return "bitmap" if by_bitmap < by_index else "index"


def encode(
    x: Array, chunks: Chunking, dropit: DropIT, scores: Array | None
) -> tuple[Array, Array]:
    """The kept values and their positions.

    Args:
      x: shape (*rows, row size).
      chunks: how a row is cut.
      dropit: what to keep.
      scores: what to rank elements by; `None`: their magnitude.
    """
    segments = chunking.split(x, chunks.segments)
    ranked: list[Array] | list[None] = [None] * len(segments)
    if scores is not None:
        ranked = chunking.split(scores, chunks.segments)
    if choose(chunks, dropit) == "bitmap":
        return _to_bitmap(segments, ranked, dropit)
    return _to_indices(segments, ranked, chunks, dropit)


def decode(values: Array, positions: Array, chunks: Chunking, dropit: DropIT) -> Array:
    """Kept values in their places, and zero elsewhere: shape (*rows, row size)."""
    place = _from_bitmap if choose(chunks, dropit) == "bitmap" else _from_indices
    return chunking.whole(place(values, positions, chunks, dropit), chunks)


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


def _to_indices(
    segments: list[Array],
    scores: list[Array] | list[None],
    chunks: Chunking,
    dropit: DropIT,
) -> tuple[Array, Array]:
    picked = [
        selection.top_k(s, dropit.kept(s.shape[-1]), dropit.selection, ranked)
        for s, ranked in zip(segments, scores, strict=True)
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
            selection.place(v, p, size)
            for v, p, (_, size) in zip(
                chunking.split(values, kept),
                chunking.split(positions, kept),
                chunks.segments,
                strict=True,
            )
        ]
    )


def _to_bitmap(
    segments: list[Array], scores: list[Array] | list[None], dropit: DropIT
) -> tuple[Array, UInt8[Array, "*rows bytes"]]:
    kept = [dropit.kept(segment.shape[-1]) for segment in segments]
    masks = [
        selection.top_k_mask(segment, k, dropit.selection, ranked)
        for segment, k, ranked in zip(segments, kept, scores, strict=True)
    ]
    values = [
        selection.compact(segment, mask, k)
        for segment, mask, k in zip(segments, masks, kept, strict=True)
    ]
    return chunking.join(values), packing.pack(chunking.join(masks), 1)


def _from_bitmap(
    values: Array, positions: Array, chunks: Chunking, dropit: DropIT
) -> Array:
    mask = packing.unpack(positions, 1, chunks.row_size).astype(bool)
    return chunking.join(
        [
            selection.expand(v, m)
            for v, m in zip(
                chunking.split(values, _kept_segments(chunks, dropit)),
                chunking.split(mask, chunks.segments),
                strict=True,
            )
        ]
    )
