"""The GPU kernel that decompresses: it reads the residual once, writes the activation.

Each program has a block of chunks. From a bit mask, the prefix sum gives the slot of
each kept element among the kept values. A few indices are compared with every column in
registers; with more, the program writes zeros first and then the values over them.

Floats are moved as the integers of their bits, which keeps -0.0 and NaN. A block is
(rows, columns), with one chunk in each row and both axes padded to powers of two.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Integer

from dropit_jax.compat import pallas as pl
from dropit_jax.compat import triton as plgpu
from dropit_jax.storage.kernels import chunk_storage
from dropit_jax.storage.kernels.chunk_storage import ChunkStorage, power_of_two
from dropit_jax.storage.kernels.definitions import Positions
from dropit_jax.storage.kernels.search import places

_Integers = Int32[Array, "rows columns"]
_Mask = Bool[Array, "rows columns"]
_Values = Integer[Array, "rows columns"]

# The elements of a block, and of it for each warp: 16 for each thread.
_BLOCK = 2048
_PER_WARP = 512

# The largest k of a small chunk at which indices are compared with every column, and
# the fewest rows of a block there. Beyond, comparing costs more than writing twice,
# which the cache absorbs.
_MAX_COMPARED = 8
_COMPARED_ROWS = 64

# The most elements that `_COMPARED_ROWS` may make of a block.
_MAX_BLOCK = 2**13

# An index that no chunk has.
_NOWHERE = 2**20


def decompress(
    values: Float[Array, "*rows units kept"],
    positions: Positions,
    storage: ChunkStorage,
    dtype: jax.typing.DTypeLike,
    *,
    interpret: bool = False,
) -> Float[Array, "*rows units elements"]:
    """Puts kept values back in their places, and zero elsewhere, in one pass.

    Args:
      values: as `compress` returns them.
      positions: as `compress` returns them.
      storage: the storage that `compress` had.
      dtype: the type of the result.
      interpret: whether the GPU kernel is emulated, on any device.

    Raises:
      ValueError: there is no GPU kernel for these dtypes, this storage and number of
        units, or `values` or `positions` have another shape, or `positions` another
        dtype, than `storage` needs.
    """
    _check(values, positions, storage, dtype)
    shape = (*values.shape[:-1], storage.unit * storage.size)
    units = math.prod(values.shape[:-1])
    if not units:
        return jnp.zeros(shape, dtype)
    count = units * storage.unit
    rows, warps = _block(storage)
    unit_rows = max(1, rows // storage.unit)

    def positions_block(i: Any) -> tuple[Any, int]:
        # Several blocks of less than a unit read the positions of one unit.
        return i >> _log2(max(1, storage.unit // rows)), 0

    bits = pl.pallas_call(
        functools.partial(
            _kernel,
            storage=storage,
            dtypes=(values.dtype, jnp.dtype(dtype)),
            count=count,
            interpret=interpret,
        ),
        out_shape=chunk_storage.result(
            (count, storage.size), chunk_storage.bits_dtype(dtype), values
        ),
        grid=(pl.cdiv(count, rows),),
        in_specs=[
            pl.BlockSpec((rows, storage.kept), lambda i: (i, 0)),
            pl.BlockSpec((unit_rows, storage.positions), positions_block),
        ],
        out_specs=pl.BlockSpec((rows, storage.size), lambda i: (i, 0)),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name="dropit_decompress",
    )(
        chunk_storage.to_bits(values).reshape(count, storage.kept),
        positions.reshape(units, storage.positions),
    )
    return chunk_storage.from_bits(bits, dtype).reshape(shape)


def _check(
    values: Array, positions: Array, storage: ChunkStorage, dtype: jax.typing.DTypeLike
) -> None:
    units = math.prod(values.shape[:-1])
    chunk_storage.check(dtype, storage, units)
    chunk_storage.check(values.dtype, storage, units)
    stored = (*values.shape[:-1], storage.positions)
    if values.ndim < 2 or values.shape[-1] != storage.unit * storage.kept:
        raise ValueError(
            f"values are (..., units, {storage.unit * storage.kept}), "
            f"not {values.shape}."
        )
    if positions.shape != stored or positions.dtype != storage.position_dtype:
        raise ValueError(
            f"positions are {storage.position_dtype.name}{stored}, not "
            f"{positions.dtype.name}{positions.shape}."
        )


def _compared(storage: ChunkStorage) -> bool:
    """Returns whether indices are compared with every column."""
    return storage.ordered and storage.kept <= _MAX_COMPARED


def _block(storage: ChunkStorage) -> tuple[int, int]:
    """Returns the numbers of chunks in a block and of warps that share it."""
    columns = power_of_two(storage.size)
    least = min(_COMPARED_ROWS, _MAX_BLOCK // columns) if _compared(storage) else 1
    rows = max(_BLOCK // columns, least, 1)
    warps = max(1, rows * columns // _PER_WARP)
    if _compared(storage):
        # With at most as many threads as rows, Triton gives each thread a row, and
        # loads an index once; with more threads it loads one again for every column.
        warps = min(warps, max(1, rows // 32))
    return rows, min(16, warps)


def _log2(power: int) -> int:
    return power.bit_length() - 1


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """The stored values and positions of a block of chunks.

    Attributes:
      storage: how chunks are stored.
      value_dtype: the type of the kept values.
      dtype: the type of the result, to which loaded values are cast.
      values: the reference to the bits of kept values, (rows, storage.kept).
      positions: the reference to positions, (units, storage.positions).
      first: the number of the block's first chunk.
    """

    storage: ChunkStorage
    value_dtype: jnp.dtype
    dtype: jnp.dtype
    values: Any
    positions: Any
    first: Any

    def load_values(self, row: _Integers, slot: _Integers, inside: _Mask) -> _Values:
        """Loads the bits of kept values, cast to `dtype`."""
        bits = plgpu.load(self.values.at[row, slot], mask=inside, other=0)
        return chunk_storage.cast_bits(bits, self.value_dtype, self.dtype)

    def load_indices(self, row: _Integers, slot: _Integers, inside: _Mask) -> _Integers:
        """Loads the indices of kept values."""
        if self.storage.packed:
            first = self._of_unit(row) * self.storage.kept
            return self._load_codes(row, first + slot, self.storage.index_bits, inside)
        ref = self.positions.at[row, slot]
        return plgpu.load(ref, mask=inside, other=0).astype(jnp.int32)

    def load_mask(self, row: _Integers, column: _Integers, inside: _Mask) -> _Integers:
        """Loads bits of the bitmap: 1 where an element is kept, else 0."""
        first = self._of_unit(row) * self.storage.size
        return self._load_codes(row, first + column, 1, inside)

    def _of_unit(self, row: _Integers) -> Any:
        """Returns the number of each row's chunk in its unit."""
        return self.first + row & self.storage.unit - 1

    def _load_codes(
        self, row: _Integers, place: _Integers, bits: int, inside: _Mask
    ) -> _Integers:
        """Loads codes of `bits` bits by their place in the row's unit."""
        bit = place * bits
        ref = self.positions.at[row >> _log2(self.storage.unit), bit >> 3]
        byte = plgpu.load(ref, mask=inside, other=0).astype(jnp.int32)
        return byte >> (bit & 7) & ((1 << bits) - 1)


def _kernel(
    values_ref: Any,
    positions_ref: Any,
    out_ref: Any,
    *,
    storage: ChunkStorage,
    dtypes: tuple[jnp.dtype, jnp.dtype],
    count: int,
    interpret: bool,
) -> None:
    """Decompresses a block of chunks."""
    rows = values_ref.shape[0]
    first = pl.program_id(0) * rows
    chunks = _Chunks(storage, *dtypes, values_ref, positions_ref, first)
    row, column = places((rows, power_of_two(storage.size)))
    inside = (first + row < count) & (column < storage.size)
    if storage.encoding == "bitmap":
        _store(out_ref.at[row, column], _from_bitmap(chunks, inside), inside)
        return
    if _compared(storage):
        placed = _from_indices(chunks, column, count)
        _store(out_ref.at[row, column], placed, inside)
        return
    _store(out_ref.at[row, column], jnp.zeros_like(row), inside)
    # No other program writes these chunks, and after the barrier all zeros of this one
    # are written: the values come last.
    if not interpret:
        plgpu.debug_barrier()
    row, slot = places((rows, power_of_two(storage.kept)))
    kept = (first + row < count) & (slot < storage.kept)
    values = chunks.load_values(row, slot, kept)
    # Where a store is masked, the emulation writes the old value back: slots that pad
    # the block need an index of their own, which no value has.
    indices = jnp.where(kept, chunks.load_indices(row, slot, kept), _NOWHERE)
    _store(out_ref.at[row, indices], values, kept)


def _from_bitmap(chunks: _Chunks, inside: _Mask) -> _Values:
    """Returns the block, with the kept values where the bitmap has ones."""
    row, column = places(inside.shape)
    mask = chunks.load_mask(row, column, inside)
    slot = jnp.cumsum(mask, axis=1) - 1
    return chunks.load_values(row, slot, mask > 0)


def _from_indices(chunks: _Chunks, column: _Integers, count: int) -> _Values:
    """Returns the block, with the kept values at their indices."""
    placed = jnp.zeros(column.shape, chunk_storage.bits_dtype(chunks.dtype))
    row, first = places((column.shape[0], 1))
    exists = chunks.first + row < count
    for slot in range(chunks.storage.kept):
        # One index and one value for each row, which Triton broadcasts to its columns.
        index = chunks.load_indices(row, first + slot, exists)
        value = chunks.load_values(row, first + slot, exists)
        placed = jnp.where(index == column, value, placed)
    return placed


def _store(ref: Any, x: _Values, inside: _Mask) -> None:
    plgpu.store(ref, x.astype(ref.dtype), mask=inside)
