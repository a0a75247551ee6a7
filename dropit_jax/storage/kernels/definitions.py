"""The results of the GPU kernels, defined in plain JAX.

The GPU kernels are tested against these functions. Values are copied as bits, and cast
only to `ChunkStorage.value_dtype` and back.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped, UInt8, UInt16

from dropit_jax.storage import packing
from dropit_jax.storage.kernels.chunk_storage import (
    ChunkStorage,
    cast_bits,
    from_bits,
    to_bits,
)
from dropit_jax.storage.selection import elements, small_chunks
from dropit_jax.storage.shapes import Shape

# Packed bytes, or indices.
Positions = UInt8[Array, "*rows units stored"] | UInt16[Array, "*rows units stored"]


def compress(
    x: Float[Array, "*rows units elements"],
    storage: ChunkStorage,
    before: UInt8[Array, "*rows units"] | None = None,
) -> tuple[Float[Array, "*rows units kept"], Positions]:
    """Keeps the largest magnitudes of each chunk.

    For D = 16, k = 2 and indices, `x` of (*rows, units, 16) gives values of
    (*rows, units, 2) and positions of uint8, (*rows, units, 1).

    Args:
      x: whole units, `elements = storage.unit * storage.size`.
      storage: how chunks are stored.
      before: the result of `first_index_operand`, or `None`.

    Returns:
      The kept values, (*rows, units, storage.unit * storage.kept), and their positions,
      (*rows, units, storage.positions).
    """
    leading = x.shape[:-1]
    if _is_large_bitmap(storage):
        values, positions = _select_large(x, storage)
    else:
        chunks = _in_chunks(x, storage.unit, storage.size)
        values, positions = _select(chunks, leading, storage, before)
    if values.dtype != storage.value_dtype:
        values = values.astype(storage.value_dtype)
    return values.reshape(*leading, storage.unit * storage.kept), positions


def first_index_operand(
    units: Sequence[int], storage: ChunkStorage
) -> UInt8[Array, "*rows units"] | None:
    """Returns the bytes that `compress` starts its first pass with, one for each unit.

    They are `BEFORE_FIRST`. Returns `None` unless D = 16, k = 2 and indices are stored,
    as the selection in other chunks is slower with this operand.

    Args:
      units: the leading axes, (*rows, units).
      storage: how chunks are stored.
    """
    if not _has_index_pairs(storage) or (storage.size, storage.kept) != (16, 2):
        return None
    return lax.full(units, small_chunks.BEFORE_FIRST, jnp.uint8)


# `jax.jit` keeps one trace for all arrays that `dispatch.decompress` may wait for.
@functools.partial(
    jax.jit, static_argnames=("storage", "dtype", "by_reduction"), inline=True
)
def decompress(
    values: Float[Array, "*rows units kept"],
    positions: Positions,
    storage: ChunkStorage,
    dtype: jax.typing.DTypeLike,
    by_reduction: bool = False,
) -> Float[Array, "*rows units elements"]:
    """Puts kept values back in their places, and zero elsewhere.

    Args:
      values: as `compress` returns them.
      positions: as `compress` returns them.
      storage: the storage that `compress` had.
      dtype: the type of the result.
      by_reduction: whether small chunks with indices are rebuilt by
        `small_chunks.place_by_reduction`, which has no gradient.
    """
    if jnp.dtype(dtype).itemsize == 4:
        # The others are moved as bits: XLA's CPU compiler loses the payload of a NaN.
        return place_kept(values.astype(dtype), positions, storage, by_reduction)
    kept = cast_bits(to_bits(values), values.dtype, dtype)
    return from_bits(place_kept(kept, positions, storage, by_reduction), dtype)


def place_kept(
    kept: Shaped[Array, "*rows units kept"],
    positions: Positions,
    storage: ChunkStorage,
    by_reduction: bool = False,
) -> Shaped[Array, "*rows units elements"]:
    """Returns kept elements of any type in their places, and zero elsewhere.

    Its arguments are those of `decompress`.
    """
    if _is_large_bitmap(storage):
        return elements.expand_bitmap(kept, positions, ((storage.unit, storage.size),))
    leading = kept.shape[:-1]
    kept = _in_chunks(kept, storage.unit, storage.kept)
    if storage.encoding == "bitmap":
        mask = packing.unpack(positions, 1, storage.unit * storage.size).astype(bool)
        rebuilt = elements.expand(kept, _in_chunks(mask, storage.unit, storage.size))
    else:
        rebuilt = _at_indices(kept, positions, storage, by_reduction)
    return rebuilt.reshape(*leading, storage.unit * storage.size)


def _at_indices(
    kept: Shaped[Array, "*chunks kept"],
    positions: Positions,
    storage: ChunkStorage,
    by_reduction: bool,
) -> Shaped[Array, "*chunks size"]:
    """Returns chunks with the kept elements at their stored indices, else zero."""
    paired = _has_index_pairs(storage)
    if storage.packed and not paired:  # a byte may hold indices of two chunks
        positions = packing.unpack(positions, 4, storage.unit * storage.kept)
    if not paired:
        positions = positions.reshape(kept.shape)
    if by_reduction and storage.size <= elements.MAX_SMALL:
        return small_chunks.place_by_reduction(kept, positions, storage.size, paired)
    if paired:
        return small_chunks.place_nibbles(kept, positions, storage.size)
    return elements.place(kept, positions, storage.size)


def _in_chunks(x: Array, unit: int, size: int) -> Array:
    """Reshapes (..., unit * size) -> (..., unit, size); returns `x` if `unit` is 1."""
    return x if unit == 1 else x.reshape(*x.shape[:-1], unit, size)


def _has_index_pairs(storage: ChunkStorage) -> bool:
    """Returns whether each byte holds two indices of one chunk (D <= 16, even k)."""
    return storage.ordered and storage.packed and storage.unit == 1


def _is_large_bitmap(storage: ChunkStorage) -> bool:
    """Returns whether all chunks of a unit are compacted as one row of elements."""
    return storage.encoding == "bitmap" and storage.size > elements.MAX_SMALL


def _select_large(
    x: Float[Array, "*rows units elements"], storage: ChunkStorage
) -> tuple[Float[Array, "*rows units kept"], Positions]:
    """Returns the kept values and the bit masks of units with large chunks."""
    segments = ((storage.unit, storage.size),)
    magnitudes = elements.magnitude(x)
    bits, bitmap = elements.top_k_bitmap(
        to_bits(x), segments, (storage.kept,), magnitudes
    )
    return from_bits(bits, x.dtype), bitmap


def _select(
    chunks: Float[Array, "*chunks size"],
    leading: Shape,
    storage: ChunkStorage,
    before: UInt8[Array, "*chunks"] | None,
) -> tuple[Shaped[Array, "*chunks kept"], Positions]:
    """Returns the kept elements of chunks and their stored positions.

    Args:
      chunks: (*leading, unit, size), or (*leading, size) for units of one chunk.
      leading: the axes of the units, (*rows, units).
      storage: how chunks are stored.
      before: as in `compress`.
    """
    k = storage.kept
    if storage.ordered:
        paired = _has_index_pairs(storage)
        if before is not None:
            values, indices = small_chunks.top_2_of_magnitudes(chunks, before)
        else:
            values, apart = small_chunks.top_k_of_magnitudes(chunks, k, paired)
            indices = small_chunks.stack(apart)
        if storage.packed and not paired:
            indices = indices.reshape(*leading, storage.unit * k)
            return values, packing.pack(indices, storage.index_bits)
    else:
        mask = elements.top_k_mask(chunks, k)
        values = from_bits(elements.compact(to_bits(chunks), mask, k), chunks.dtype)
        if storage.encoding == "bitmap":
            mask = mask.reshape(*leading, storage.unit * storage.size)
            return values, packing.pack(mask, 1)
        slots = jnp.broadcast_to(jnp.arange(storage.size), chunks.shape)
        indices = elements.compact(slots, mask, k)
    return values, indices.reshape(*leading, storage.positions).astype(
        storage.position_dtype
    )
