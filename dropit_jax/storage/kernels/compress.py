"""GPU kernels that compress: they read the activation once and write the residual.

A block is (rows, columns) in registers, with one chunk in each row and both axes padded
to powers of two, as Triton needs. Floats are compared and moved as the integers of
their bits, which keeps -0.0, denormal numbers and NaN.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Integer, UInt32

from dropit_jax.compat import pallas as pl
from dropit_jax.compat import triton as plgpu
from dropit_jax.storage.kernels import chunk_storage, search
from dropit_jax.storage.kernels.chunk_storage import (
    MAX_ORDERED,
    ChunkStorage,
    power_of_two,
)
from dropit_jax.storage.kernels.definitions import Positions

_Integers = Int32[Array, "rows columns"]
_Column = Int32[Array, "rows 1"]
_Mask = Bool[Array, "rows columns"]

# The elements of a block of small chunks: 16 for each thread of 4 warps.
_BLOCK = 2048
_WARPS = 4

# The elements of a large chunk for each warp: 32 for each thread.
_PER_WARP = 1024


def compress(
    x: Float[Array, "*rows units elements"],
    storage: ChunkStorage,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "*rows units kept"], Positions]:
    """Keeps the largest magnitudes of each chunk, in one pass.

    Args:
      x: whole units, `elements = storage.unit * storage.size`.
      storage: how chunks are stored.
      interpret: whether the GPU kernel is emulated, on any device.

    Returns:
      The kept values, (*rows, units, storage.unit * storage.kept), and their positions,
      (*rows, units, storage.positions).

    Raises:
      ValueError: there is no GPU kernel for this dtype, storage and number of units, or
        `x` is not of whole units.
    """
    elements = storage.unit * storage.size
    chunk_storage.check(x.dtype, storage, x.size // elements)
    if x.ndim < 2 or x.shape[-1] != elements:
        raise ValueError(f"x is (..., units, {elements}), not {x.shape}.")
    units, chunks = x.size // elements, x.size // storage.size
    outputs = [
        chunk_storage.result(
            (chunks, storage.kept), chunk_storage.bits_dtype(storage.value_dtype), x
        ),
        chunk_storage.result((units, storage.positions), storage.position_dtype, x),
    ]
    if units:
        bits = chunk_storage.to_bits(x).reshape(chunks, storage.size)
        values, positions = _launch(bits, x.dtype, storage, outputs, interpret)
    else:
        values, positions = (jnp.zeros(out.shape, out.dtype) for out in outputs)
    values = chunk_storage.from_bits(values, storage.value_dtype)
    return (
        values.reshape(*x.shape[:-1], storage.unit * storage.kept),
        positions.reshape(*x.shape[:-1], storage.positions),
    )


def _launch(
    x: Integer[Array, "chunks size"],
    dtype: jnp.dtype,
    storage: ChunkStorage,
    outputs: list[jax.ShapeDtypeStruct],
    interpret: bool,
) -> Sequence[Array]:
    """Runs the GPU kernel for this D over all chunks, given by their bits."""
    if storage.size <= MAX_ORDERED:
        rows = max(storage.unit, _BLOCK // power_of_two(storage.size))
        kernel, warps = _small_chunks, _WARPS
    else:
        rows = storage.unit
        kernel = _large_chunks
        warps = min(16, max(1, _large_width(storage) // _PER_WARP))

    def block(array: Any, rows: int) -> pl.BlockSpec:
        return pl.BlockSpec((rows, array.shape[-1]), lambda i: (i, 0))

    values, positions = outputs
    return pl.pallas_call(
        functools.partial(kernel, dtype=dtype, storage=storage, count=x.shape[0]),
        out_shape=outputs,
        grid=(pl.cdiv(x.shape[0], rows),),
        in_specs=[block(x, rows)],
        out_specs=[block(values, rows), block(positions, rows // storage.unit)],
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name="dropit_compress",
    )(x)


def _small_chunks(
    x_ref: Any,
    values_ref: Any,
    positions_ref: Any,
    *,
    dtype: jnp.dtype,
    storage: ChunkStorage,
    count: int,
) -> None:
    """Compresses a block of chunks, for D <= `MAX_ORDERED`."""
    rows = x_ref.shape[0]
    first = pl.program_id(0) * rows
    row, column = search.places((rows, power_of_two(storage.size)))
    inside = (first + row < count) & (column < storage.size)
    bits = _load_bits(x_ref, row, column, inside)
    cast = functools.partial(
        chunk_storage.cast_bits, dtype=dtype, new_dtype=storage.value_dtype
    )
    pack = functools.partial(
        _store_packed, storage=storage, units=count // storage.unit
    )
    if storage.ordered:
        taken, indices = search.largest_first(bits, inside, storage.kept, dtype)
        row, slot = search.places(taken.shape)
        stored = (first + row < count) & (slot < storage.kept)
        _store(values_ref, row, slot, cast(taken), stored)
        if storage.packed:
            words = _words(indices, slot, storage.index_bits)
            pack(positions_ref, words, storage.kept * storage.index_bits)
        else:
            _store(positions_ref, row, slot, indices, stored)
    else:
        keep, slot = search.largest(bits, inside, storage.kept, dtype)
        _store(values_ref, row, slot, cast(bits), keep)
        pack(positions_ref, _words(keep, column, 1), storage.size)


def _large_chunks(
    x_ref: Any,
    values_ref: Any,
    positions_ref: Any,
    *,
    dtype: jnp.dtype,
    storage: ChunkStorage,
    count: int,
) -> None:
    """Compresses the chunks of a unit, one after the other, for D > `MAX_ORDERED`."""
    del count  # each program has one whole unit: no row is out of range
    cast = functools.partial(
        chunk_storage.cast_bits, dtype=dtype, new_dtype=storage.value_dtype
    )
    shape = (1, _large_width(storage))

    def chunk(i: Any, open_byte: _Column) -> _Column:
        row, column = search.places(shape)
        row += i
        # Column 0 is the first bit of a byte of the unit, so that every 8 columns are a
        # byte: the first `i * D % 8` columns belong to the chunk before.
        column -= i * storage.size & 7
        inside = (column >= 0) & (column < storage.size)
        bits = _load_bits(x_ref, row, column, inside)
        keep, slot = search.largest(bits, inside, storage.kept, dtype)
        _store(values_ref, row, slot, cast(bits), keep)
        if storage.packed:
            return _store_bytes(
                positions_ref, keep, i * storage.size, storage.size, open_byte
            )
        _store(positions_ref, row, slot, column, keep)
        return open_byte

    none = jnp.zeros((1, 1), jnp.int32)
    if storage.unit == 1:
        chunk(0, none)
    else:
        lax.fori_loop(0, storage.unit, chunk, none)


def _large_width(storage: ChunkStorage) -> int:
    """Returns the width of a block that holds a large chunk, a power of two.

    The first byte of the chunk's bit mask may begin with up to 7 bits of the previous
    chunk, which take columns too.
    """
    return power_of_two(storage.size + (7 if storage.unit > 1 else 0))


def _load_bits(ref: Any, row: _Integers, column: _Integers, inside: _Mask) -> _Integers:
    """Loads the bits of floats as int32; those of 16-bit floats are not negative."""
    bits = plgpu.load(ref.at[row, column], mask=inside, other=0)
    return bits.astype(jnp.int32)


def _store(
    ref: Any,
    row: _Integers,
    slot: _Integers,
    x: Integer[Array, "rows columns"],
    stored: _Mask,
) -> None:
    """Stores the lowest bits of integers, as many as the type of `ref` has."""
    plgpu.store(ref.at[row, slot], x.astype(ref.dtype), mask=stored)


def _words(
    codes: _Integers | _Mask, place: _Integers, bits: int
) -> list[UInt32[Array, "rows 1"]]:
    """Packs the codes of each row into 32-bit words, the first in the lowest bits.

    For example, codes of 4 bits, 1, 2 and 3, are the word 0x321.

    Args:
      codes: the codes; those that pad a row are 0.
      place: the number of each code in its row.
      bits: bits of a code.
    """
    shifted = codes.astype(jnp.uint32) << (place * bits & 31).astype(jnp.uint32)
    count = -(-codes.shape[1] * bits // 32)
    if count == 1:
        return [jnp.sum(shifted, axis=1, keepdims=True)]
    return [
        jnp.sum(jnp.where(place * bits >> 5 == i, shifted, 0), axis=1, keepdims=True)
        for i in range(count)
    ]


def _store_packed(
    ref: Any,
    words: list[UInt32[Array, "rows 1"]],
    bits: int,
    storage: ChunkStorage,
    units: int,
) -> None:
    """Stores the words of each chunk side by side in the bytes of its unit.

    For example, 12 bits of each of 2 chunks, 0x321 and 0x654, are stored as 3 bytes,
    0x21, 0x43 and 0x65.

    Args:
      ref: the bytes, (units, storage.positions).
      words: the words of all chunks of the block, the lowest first.
      bits: bits of a chunk.
      storage: how chunks are stored.
      units: how many units there are in all.
    """
    rows = words[0].shape[0] // storage.unit
    shape = (rows, storage.unit, power_of_two(ref.shape[1]))
    chunk = lax.broadcasted_iota(jnp.int32, shape, 1)
    byte = lax.broadcasted_iota(jnp.int32, shape, 2)
    packed = jnp.zeros(shape, jnp.uint32)
    for i, column in enumerate(words):
        word = column.reshape(rows, storage.unit, 1)
        # The first bit of the byte, counted from the first bit of the word.
        start = 8 * byte - chunk * bits - 32 * i
        right = word >> jnp.clip(start, 0, 31).astype(jnp.uint32)
        left = word << jnp.clip(-start, 0, 31).astype(jnp.uint32)
        part = jnp.where(start >= 0, right, left)
        packed |= jnp.where((start > -8) & (start < 32), part, 0)
    packed = jnp.sum(packed & 0xFF, axis=1)
    row, column = search.places(packed.shape)
    inside = (pl.program_id(0) * rows + row < units) & (column < ref.shape[1])
    _store(ref, row, column, packed, inside)


def _store_bytes(
    ref: Any, mask: _Mask, start: Any, size: int, open_byte: _Column
) -> _Column:
    """Stores the bytes of a chunk's bit mask, except for a last one that is not full.

    For example, with D = 65 the second chunk has bits 65 to 129 of the unit: bytes 8 to
    15 are stored, and byte 16 is returned with its first two bits.

    Args:
      ref: the bytes of the unit.
      mask: the bit mask of the chunk, 8 columns a byte; column 0 is the first bit of
        the byte that has the bit `start`.
      start: the first bit of the chunk in the unit.
      size: elements of the chunk.
      open_byte: the bits of earlier chunks in the first byte.

    Returns:
      The bits of this and earlier chunks in the byte after the last full one.
    """
    octets = mask.astype(jnp.int32).reshape(1, mask.shape[1] // 8, 8)
    octets = octets << lax.broadcasted_iota(jnp.int32, octets.shape, 2)
    octets = jnp.sum(octets, axis=2)
    row, column = search.places(octets.shape)
    octets = jnp.where(column == 0, octets | open_byte, octets)
    whole = ((start & 7) + size) >> 3
    _store(ref, row, (start >> 3) + column, octets, column < whole)
    return jnp.sum(jnp.where(column == whole, octets, 0), axis=1, keepdims=True)
