"""Decompression kernels: what is kept is read once, the activation is written.

A program owns a block of the result. A bitmap tells of each element whether it is kept
and, by how many are before it, which of the kept values it is. Indices tell where each
value goes: a few are compared with every column in registers; of more, the program
writes zeros first, and then the values over them.

Floats are given by the integers of their bits: -0.0 and NaN come through. A block is
(rows, columns), chunks being rows, or for the transposed result (columns, rows): `axis`
is the one along which a chunk lies. Both are padded to powers of two.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int32, Integer

from dropit_jax.kernels import plan as plans
from dropit_jax.kernels.plan import Plan, power_of_two
from dropit_jax.kernels.twins import Positions

_Integers = Int32[Array, "first second"]
_Mask = Bool[Array, "first second"]
_Values = Integer[Array, "first second"]

# Elements of a block, 16 for each thread of 4 warps.
_BLOCK = 2048
_PER_WARP = 512

# Up to so many kept elements of a small chunk are compared with every column, by blocks
# of at least so many rows. Beyond, comparing costs more than writing twice, which the
# cache absorbs.
_MAX_COMPARED = 8
_COMPARED_ROWS = 64

# Positions side by side in a transposed block: what is written of a channel at once.
_MIN_POSITIONS = 32

# The most that a transposed block holds for that.
_MAX_BLOCK = 2**13

# What a transposed block reads of a row of values, at least: the memory gives no less.
_SECTOR_BYTES = 32

# An index in no chunk.
_NOWHERE = 2**20


@dataclasses.dataclass(frozen=True)
class _Shape:
    """The block that a program works on.

    Attributes:
      rows: chunks, or positions of the transposed result.
      columns: elements of a chunk, padded.
      axis: along which the columns lie.
      warps: how many share the block.
    """

    rows: int
    columns: int
    axis: int
    warps: int

    def places(self, count: int) -> tuple[_Integers, _Integers]:
        """Row and place of each element of a block of `count` places for each row."""
        shape = (count, self.rows) if self.axis == 0 else (self.rows, count)
        place = lax.broadcasted_iota(jnp.int32, shape, self.axis)
        return lax.broadcasted_iota(jnp.int32, shape, 1 - self.axis), place


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """Where a program finds one chunk for each row of its block.

    Attributes:
      plan: how they are stored.
      value_dtype: the type of kept values.
      dtype: the type to give them as.
      values: the reference to the bits of kept values, (rows, values).
      positions: the reference to positions, (rows or units, positions).
      unit_shift: what a row's number is shifted by to give its row of positions.
      chunk: which chunk of its unit each row's is, a function of the row.
      first_value: where in a row the chunk's values begin.
      first_position: where in a row the positions of the chunk's unit begin.
    """

    plan: Plan
    value_dtype: jnp.dtype
    dtype: jnp.dtype
    values: Any
    positions: Any
    unit_shift: int
    chunk: Callable[[_Integers], Any]
    first_value: Any
    first_position: Any

    def load_values(self, row: _Integers, slot: _Integers, inside: _Mask) -> _Values:
        """The bits of the kept values of these numbers."""
        ref = self.values.at[row, self.first_value + slot]
        bits = plgpu.load(ref, mask=inside, other=0)
        return plans.cast_bits(bits, self.value_dtype, self.dtype)

    def load_indices(self, row: _Integers, slot: _Integers, inside: _Mask) -> _Integers:
        """The indices of the kept values of these numbers."""
        if self.plan.packed:
            first = self.chunk(row) * self.plan.kept
            return self._load_codes(row, first + slot, self.plan.index_bits, inside)
        ref = self.positions.at[row, self.first_position + slot]
        return plgpu.load(ref, mask=inside, other=0).astype(jnp.int32)

    def load_mask(self, row: _Integers, column: _Integers, inside: _Mask) -> _Integers:
        """One where the bitmap says that an element is kept, else zero."""
        first = self.chunk(row) * self.plan.size
        return self._load_codes(row, first + column, 1, inside)

    def _load_codes(
        self, row: _Integers, place: _Integers, bits: int, inside: _Mask
    ) -> _Integers:
        bit = place * bits
        ref = self.positions.at[
            row >> self.unit_shift, self.first_position + (bit >> 3)
        ]
        byte = plgpu.load(ref, mask=inside, other=0).astype(jnp.int32)
        return byte >> (bit & 7) & ((1 << bits) - 1)


def decompress(
    values: Float[Array, "*rows units kept"],
    positions: Positions,
    plan: Plan,
    dtype: jax.typing.DTypeLike,
    *,
    interpret: bool = False,
) -> Float[Array, "*rows units elements"]:
    """Puts kept values back in their places, and zero elsewhere, in one pass.

    Args:
      values: as `compress` returns them.
      positions: as `compress` returns them.
      plan: what they were made by.
      dtype: the result's.
      interpret: whether the kernel is emulated, on any device.

    Raises:
      ValueError: there is no kernel for this, or the shapes are not the plan's.
    """
    _check(values, positions, plan, dtype)
    whole = (*values.shape[:-1], plan.unit * plan.size)
    units = math.prod(values.shape[:-1])
    if not units:
        return jnp.zeros(whole, dtype)
    count = units * plan.unit
    shape = _shape(plan, axis=1)
    unit_rows = max(1, shape.rows // plan.unit)

    def units_of(i: Any) -> tuple[Any, int]:
        # A block of less than a unit: several have the same positions.
        return i >> _log2(max(1, plan.unit // shape.rows)), 0

    bits = pl.pallas_call(
        functools.partial(
            _chunks_kernel,
            plan=plan,
            dtypes=(values.dtype, jnp.dtype(dtype)),
            count=count,
            shape=shape,
            interpret=interpret,
        ),
        out_shape=plans.result((count, plan.size), plans.bits_dtype(dtype), values),
        grid=(pl.cdiv(count, shape.rows),),
        in_specs=[
            pl.BlockSpec((shape.rows, plan.kept), lambda i: (i, 0)),
            pl.BlockSpec((unit_rows, plan.positions), units_of),
        ],
        out_specs=pl.BlockSpec((shape.rows, plan.size), lambda i: (i, 0)),
        compiler_params=plgpu.CompilerParams(num_warps=shape.warps, num_stages=1),
        interpret=interpret,
        name="dropit_decompress",
    )(
        plans.to_bits(values).reshape(count, plan.kept),
        positions.reshape(units, plan.positions),
    )
    return plans.from_bits(bits, dtype).reshape(whole)


def decompress_transposed(
    values: Float[Array, "batch positions units kept"],
    positions: Positions,
    plan: Plan,
    dtype: jax.typing.DTypeLike,
    *,
    interpret: bool = False,
) -> Float[Array, "batch channels positions"]:
    """`decompress`, with the channels (the chunks' elements) before the positions.

    The arguments and the errors are those of `decompress`.
    """
    _check(values, positions, plan, dtype)
    if values.ndim != 4:
        raise ValueError(
            f"values are (batch, positions, units, kept), not {values.shape}."
        )
    batch, length, units, _ = values.shape
    chunks = units * plan.unit
    whole = (batch, chunks * plan.size, length)
    if not math.prod(whole):
        return jnp.zeros(whole, dtype)
    shape = _shape(plan, axis=0, least_rows=_MIN_POSITIONS, most_rows=length)
    sector = _SECTOR_BYTES // (plan.kept * values.dtype.itemsize)
    group = min(chunks, power_of_two(max(1, sector)))

    def rows_of(_: Any, i: Any, sample: Any) -> tuple[Any, Any, int]:
        return sample, i, 0

    bits = pl.pallas_call(
        functools.partial(
            _transposed_kernel,
            plan=plan,
            dtypes=(values.dtype, jnp.dtype(dtype)),
            shape=shape,
            group=group,
            length=length,
            interpret=interpret,
        ),
        out_shape=plans.result(whole, plans.bits_dtype(dtype), values),
        # Programs for the same rows run together, so that the cache has the rows.
        grid=(pl.cdiv(chunks, group), pl.cdiv(length, shape.rows), batch),
        in_specs=[
            pl.BlockSpec((None, shape.rows, chunks * plan.kept), rows_of),
            pl.BlockSpec((None, shape.rows, units * plan.positions), rows_of),
        ],
        out_specs=pl.BlockSpec(
            (None, whole[1], shape.rows), lambda _, i, sample: (sample, 0, i)
        ),
        compiler_params=plgpu.CompilerParams(num_warps=shape.warps, num_stages=1),
        interpret=interpret,
        name="dropit_decompress_transposed",
    )(
        plans.to_bits(values).reshape(batch, length, -1),
        positions.reshape(batch, length, -1),
    )
    return plans.from_bits(bits, dtype)


def _check(
    values: Array, positions: Array, plan: Plan, dtype: jax.typing.DTypeLike
) -> None:
    units = math.prod(values.shape[:-1])
    plans.check(dtype, plan, units)
    plans.check(values.dtype, plan, units)
    stored = (*values.shape[:-1], plan.positions)
    if values.ndim < 2 or values.shape[-1] != plan.unit * plan.kept:
        raise ValueError(
            f"values are (..., units, {plan.unit * plan.kept}), not {values.shape}."
        )
    if positions.shape != stored or positions.dtype != plan.position_dtype:
        raise ValueError(
            f"positions are {plan.position_dtype.name}{stored}, not "
            f"{positions.dtype.name}{positions.shape}."
        )


def _compared(plan: Plan) -> bool:
    """Whether indices are compared with every column."""
    return plan.ordered and plan.kept <= _MAX_COMPARED


def _shape(
    plan: Plan, axis: int, least_rows: int = 1, most_rows: int | None = None
) -> _Shape:
    """A block of `_BLOCK` elements, or for so many rows of up to `_MAX_BLOCK`."""
    columns = power_of_two(plan.size)
    if _compared(plan):
        least_rows = _COMPARED_ROWS
    rows = max(_BLOCK // columns, min(least_rows, _MAX_BLOCK // columns), 1)
    if most_rows is not None:
        rows = min(rows, power_of_two(most_rows))
    warps = max(1, rows * columns // _PER_WARP)
    if _compared(plan):
        # No more threads than rows: Triton then gives each a row, and loads an index
        # once. With more it loads it anew for every column.
        warps = min(warps, max(1, rows // 32))
    return _Shape(rows, columns, axis, min(16, warps))


def _log2(power: int) -> int:
    return power.bit_length() - 1


def _chunks_kernel(
    values_ref: Any,
    positions_ref: Any,
    out_ref: Any,
    *,
    plan: Plan,
    dtypes: tuple[jnp.dtype, jnp.dtype],
    count: int,
    shape: _Shape,
    interpret: bool,
) -> None:
    """Decompresses a block of chunks."""
    first = pl.program_id(0) * shape.rows
    chunks = _Chunks(
        plan,
        *dtypes,
        values_ref,
        positions_ref,
        unit_shift=_log2(plan.unit),
        chunk=lambda row: first + row & plan.unit - 1,
        first_value=0,
        first_position=0,
    )

    def store(row: _Integers, column: _Integers, x: _Values, inside: _Mask) -> None:
        _store(out_ref.at[row, column], x, inside)

    def exists(row: _Integers) -> _Mask:
        return first + row < count

    _decompress(chunks, shape, exists, store, interpret)


def _transposed_kernel(
    values_ref: Any,
    positions_ref: Any,
    out_ref: Any,
    *,
    plan: Plan,
    dtypes: tuple[jnp.dtype, jnp.dtype],
    shape: _Shape,
    group: int,
    length: int,
    interpret: bool,
) -> None:
    """Decompresses some chunks of a block of positions, one after the other."""
    first_chunk = pl.program_id(0) * group
    first = pl.program_id(1) * shape.rows
    count = values_ref.shape[1] // plan.kept

    def chunk(i: Any, _: None) -> None:
        number = first_chunk + i
        chunks = _Chunks(
            plan,
            *dtypes,
            values_ref,
            positions_ref,
            unit_shift=0,
            chunk=lambda _: number & plan.unit - 1,
            first_value=number * plan.kept,
            first_position=(number >> _log2(plan.unit)) * plan.positions,
        )

        def store(row: _Integers, column: _Integers, x: _Values, inside: _Mask) -> None:
            _store(out_ref.at[number * plan.size + column, row], x, inside)

        def exists(row: _Integers) -> _Mask:
            return (first + row < length) & (number < count)

        _decompress(chunks, shape, exists, store, interpret)

    lax.fori_loop(0, group, chunk, None)


def _decompress(
    chunks: _Chunks,
    shape: _Shape,
    exists: Callable[[_Integers], _Mask],
    store: Callable[[_Integers, _Integers, _Values, _Mask], None],
    interpret: bool,
) -> None:
    """Writes one chunk for each row of a block."""
    plan = chunks.plan
    row, column = shape.places(shape.columns)
    inside = exists(row) & (column < plan.size)
    if plan.encoding == "bitmap":
        store(row, column, _from_bitmap(chunks, shape, inside), inside)
        return
    if _compared(plan):
        store(row, column, _from_indices(chunks, shape, exists), inside)
        return
    store(row, column, jnp.zeros_like(row), inside)
    # The program owns these chunks, and what its threads write before a barrier is
    # written before any of them goes on: the zeros come first.
    if not interpret:
        plgpu.debug_barrier()
    row, slot = shape.places(power_of_two(plan.kept))
    kept = exists(row) & (slot < plan.kept)
    values = chunks.load_values(row, slot, kept)
    # Slots that pad the block belong nowhere: the emulation writes old values back
    # where a store is masked.
    indices = jnp.where(kept, chunks.load_indices(row, slot, kept), _NOWHERE)
    store(row, indices, values, kept)


def _from_bitmap(chunks: _Chunks, shape: _Shape, inside: _Mask) -> _Values:
    """The block, each element with the value that the bitmap gives it."""
    row, column = shape.places(shape.columns)
    mask = chunks.load_mask(row, column, inside)
    slot = jnp.cumsum(mask, axis=shape.axis) - 1
    return chunks.load_values(row, slot, mask > 0)


def _from_indices(
    chunks: _Chunks,
    shape: _Shape,
    exists: Callable[[_Integers], _Mask],
) -> _Values:
    """The block, each element with the value whose index it has."""
    _, column = shape.places(shape.columns)
    placed = jnp.zeros(column.shape, plans.bits_dtype(chunks.dtype))
    row, first = shape.places(1)
    for slot in range(chunks.plan.kept):
        # One index and one value for each row, which Triton spreads over the columns.
        index = chunks.load_indices(row, first + slot, exists(row))
        value = chunks.load_values(row, first + slot, exists(row))
        placed = jnp.where(index == column, value, placed)
    return placed


def _store(ref: Any, x: _Values, inside: _Mask) -> None:
    plgpu.store(ref, x.astype(ref.dtype), mask=inside)
