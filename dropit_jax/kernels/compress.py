"""Compression kernels: the activation is read once, what is kept is written.

A block is (rows, columns) in registers, a chunk a row, padded to powers of two, which
is what Triton takes. Floats are given by the integers of their bits, by which they are
compared and moved: -0.0, denormal numbers and NaN come through.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int32, Integer, UInt32

from dropit_jax.kernels import plan as plans
from dropit_jax.kernels.plan import MAX_ORDERED, Plan, power_of_two

_Carry = TypeVar("_Carry")
_Integers = Int32[Array, "rows columns"]
_Column = Int32[Array, "rows 1"]
_Mask = Bool[Array, "rows columns"]

# Elements of a block of small chunks: 16 for each thread of 4 warps.
_BLOCK = 2048
_WARPS = 4

# Elements of a large chunk for each warp: 32 for each thread.
_PER_WARP = 1024

# Up to so many kept elements, taking the largest that many times costs no more than a
# search through the bits of the k-th largest.
_MAX_ROUNDS = 15

# Rounds that are written out; more of them are a loop.
_MAX_UNROLLED = 8


def compress(
    x: Float[Array, "*rows units elements"], plan: Plan, *, interpret: bool = False
) -> tuple[Array, ...]:
    """Keeps the largest magnitudes of each chunk, in one pass.

    Args:
      x: `elements` is `plan.unit * plan.size`: whole chunks.
      plan: how they are stored.
      interpret: whether the kernel is emulated, on any device.

    Returns:
      The kept values, (*rows, units, plan.unit * plan.kept); their positions,
      (*rows, units, plan.positions); and where `plan.sign` is set the sign bits,
      (*rows, units, plan.sign_bytes).

    Raises:
      ValueError: there is no kernel for this, or `x` does not consist of whole units.
    """
    elements = plan.unit * plan.size
    plans.check(x.dtype, plan, x.size // elements)
    if x.ndim < 2 or x.shape[-1] != elements:
        raise ValueError(f"x is (..., units, {elements}), not {x.shape}.")
    units, chunks = x.size // elements, x.size // plan.size
    outputs = [
        plans.result((chunks, plan.kept), plans.bits_dtype(plan.value_dtype), x),
        plans.result((units, plan.positions), plan.position_dtype, x),
    ]
    if plan.sign:
        outputs.append(plans.result((units, plan.sign_bytes), "uint8", x))
    if units:
        bits = plans.to_bits(x).reshape(chunks, plan.size)
        values, *others = _launch(bits, x.dtype, plan, outputs, interpret)
    else:
        values, *others = (jnp.zeros(out.shape, out.dtype) for out in outputs)
    of_unit = (plan.unit * plan.kept, plan.positions, plan.sign_bytes)
    return tuple(
        out.reshape(*x.shape[:-1], size)
        for out, size in zip(
            (plans.from_bits(values, plan.value_dtype), *others), of_unit, strict=False
        )
    )


def _launch(
    x: Integer[Array, "chunks size"],
    dtype: jnp.dtype,
    plan: Plan,
    outputs: list[jax.ShapeDtypeStruct],
    interpret: bool,
) -> Sequence[Array]:
    """Runs the kernel for this size over all chunks, given by their bits."""
    if plan.size <= MAX_ORDERED:
        rows = max(plan.unit, _BLOCK // power_of_two(plan.size))
        kernel, warps = _small_chunks, _WARPS
    else:
        rows = plan.unit
        kernel = _large_chunks
        warps = min(16, max(1, _large_width(plan) // _PER_WARP))

    def block(array: Any, rows: int) -> pl.BlockSpec:
        return pl.BlockSpec((rows, array.shape[-1]), lambda i: (i, 0))

    values, *of_units = outputs
    return pl.pallas_call(
        functools.partial(kernel, dtype=dtype, plan=plan, count=x.shape[0]),
        out_shape=outputs,
        grid=(pl.cdiv(x.shape[0], rows),),
        in_specs=[block(x, rows)],
        out_specs=[block(values, rows)]
        + [block(a, rows // plan.unit) for a in of_units],
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name="dropit_compress",
    )(x)


def _small_chunks(
    x_ref: Any,
    values_ref: Any,
    positions_ref: Any,
    *sign_refs: Any,
    dtype: jnp.dtype,
    plan: Plan,
    count: int,
) -> None:
    """Compresses a block of chunks, for D <= `MAX_ORDERED`."""
    rows = x_ref.shape[0]
    first = pl.program_id(0) * rows
    row, column = _places((rows, power_of_two(plan.size)))
    inside = (first + row < count) & (column < plan.size)
    bits = _load_bits(x_ref, row, column, inside)
    cast = functools.partial(plans.cast_bits, dtype=dtype, new_dtype=plan.value_dtype)
    pack = functools.partial(_store_packed, plan=plan, units=count // plan.unit)
    for sign_ref in sign_refs:
        words = _words(_positive(bits, dtype), column, 1)
        pack(sign_ref, words, plan.size)
    if plan.ordered:
        taken, indices = _largest_first(bits, inside, plan.kept, dtype)
        row, slot = _places(taken.shape)
        stored = (first + row < count) & (slot < plan.kept)
        _store(values_ref, row, slot, cast(taken), stored)
        if plan.packed:
            words = _words(indices, slot, plan.index_bits)
            pack(positions_ref, words, plan.kept * plan.index_bits)
        else:
            _store(positions_ref, row, slot, indices, stored)
    else:
        keep, slot = _largest(bits, inside, plan.kept, dtype)
        _store(values_ref, row, slot, cast(bits), keep)
        pack(positions_ref, _words(keep, column, 1), plan.size)


def _large_chunks(
    x_ref: Any,
    values_ref: Any,
    positions_ref: Any,
    *sign_refs: Any,
    dtype: jnp.dtype,
    plan: Plan,
    count: int,
) -> None:
    """Compresses the chunks of a unit, one after the other, for D > `MAX_ORDERED`."""
    del count  # A program for each unit: none is outside.
    cast = functools.partial(plans.cast_bits, dtype=dtype, new_dtype=plan.value_dtype)
    shape = (1, _large_width(plan))

    def chunk(i: Any, open_bytes: tuple[Any, ...]) -> tuple[Any, ...]:
        row, column = _places(shape)
        row += i
        # Columns begin where a byte of the unit does, so that 8 of them are a byte.
        column -= i * plan.size & 7
        inside = (column >= 0) & (column < plan.size)
        bits = _load_bits(x_ref, row, column, inside)
        keep, slot = _largest(bits, inside, plan.kept, dtype)
        _store(values_ref, row, slot, cast(bits), keep)
        masks = [_positive(bits, dtype) for _ in sign_refs]
        refs = list(sign_refs)
        if plan.packed:
            masks.append(keep)
            refs.append(positions_ref)
        else:
            _store(positions_ref, row, slot, column, keep)
        return tuple(
            _store_bytes(ref, mask, i * plan.size, plan.size, open_byte)
            for ref, mask, open_byte in zip(refs, masks, open_bytes, strict=True)
        )

    none = jnp.zeros((1, 1), jnp.int32)
    _repeat(plan.unit, chunk, (none,) * (len(sign_refs) + plan.packed), unroll=1)


def _large_width(plan: Plan) -> int:
    """Columns for a large chunk, and for those before it in its first byte."""
    return power_of_two(plan.size + (7 if plan.unit > 1 else 0))


def _places(shape: tuple[int, ...]) -> tuple[_Integers, _Integers]:
    """The row and the column of each element of a block."""
    return (
        lax.broadcasted_iota(jnp.int32, shape, 0),
        lax.broadcasted_iota(jnp.int32, shape, 1),
    )


def _load_bits(ref: Any, row: _Integers, column: _Integers, inside: _Mask) -> _Integers:
    """The bits of floats, none negative where they are 16."""
    bits = plgpu.load(ref.at[row, column], mask=inside, other=0)
    return bits.astype(jnp.int32)


def _store(
    ref: Any,
    row: _Integers,
    slot: _Integers,
    x: Integer[Array, "rows columns"],
    stored: _Mask,
) -> None:
    """Stores integers as those of the reference, which take their lowest bits."""
    plgpu.store(ref.at[row, slot], x.astype(ref.dtype), mask=stored)


def _sign_shift(dtype: jnp.dtype) -> int:
    return 8 * dtype.itemsize - 1


def _magnitude(bits: _Integers, inside: _Mask, dtype: jnp.dtype) -> _Integers:
    """Integers in the order of the magnitudes; -1 for what is not inside."""
    return jnp.where(inside, bits & ((1 << _sign_shift(dtype)) - 1), -1)


def _positive(bits: _Integers, dtype: jnp.dtype) -> _Mask:
    """Where the float is above zero, and no NaN."""
    infinity = int(np.array(jnp.inf, dtype).view(f"int{8 * dtype.itemsize}"))
    return (bits > 0) & (bits <= infinity)


def _repeat(
    times: int,
    body: Callable[[Any, _Carry], _Carry],
    carry: _Carry,
    unroll: int = _MAX_UNROLLED,
) -> _Carry:
    if times > unroll:
        return lax.fori_loop(0, times, body, carry)
    for i in range(times):
        carry = body(i, carry)
    return carry


def _keys(bits: _Integers, inside: _Mask, dtype: jnp.dtype) -> _Integers:
    """What the next largest is found by; of 16-bit floats, no two are equal."""
    magnitude = _magnitude(bits, inside, dtype)
    if dtype.itemsize == 4:
        return magnitude
    column = _places(bits.shape)[1]
    tag = (MAX_ORDERED - 1 - column) << 1 | bits >> 15
    return jnp.where(inside, magnitude << 16 | tag, -1)


def _next_largest(
    keys: _Integers, bits: _Integers, dtype: jnp.dtype
) -> tuple[_Integers, _Column, _Column]:
    """Takes the largest of each row away: the keys left, its bits, and its column."""
    column = _places(keys.shape)[1]
    top = jnp.max(keys, axis=1, keepdims=True)
    if dtype.itemsize == 2:
        taken, tag = top >> 16 | (top & 1) << 15, top >> 1 & (MAX_ORDERED - 1)
        index = MAX_ORDERED - 1 - tag
    else:
        # The first of equal ones, and its sign, in one number.
        signed = column << 1 | (bits < 0).astype(jnp.int32)
        signed = jnp.where(keys == top, signed, 2 * MAX_ORDERED)
        first = jnp.min(signed, axis=1, keepdims=True)
        taken, index = top | first << 31, first >> 1
    return jnp.where(column == index, -1, keys), taken, index


def _largest_first(
    bits: _Integers, inside: _Mask, k: int, dtype: jnp.dtype
) -> tuple[_Integers, _Integers]:
    """The bits and the indices of the k largest of each row, padded with zeros."""
    slot = _places((bits.shape[0], power_of_two(k)))[1]

    def take(
        i: Any, carry: tuple[_Integers, _Integers, _Integers]
    ) -> tuple[_Integers, _Integers, _Integers]:
        keys, taken, indices = carry
        keys, value, index = _next_largest(keys, bits, dtype)
        here = slot == i
        return keys, jnp.where(here, value, taken), jnp.where(here, index, indices)

    start = (_keys(bits, inside, dtype), jnp.zeros_like(slot), jnp.zeros_like(slot))
    _, taken, indices = _repeat(k, take, start)
    return taken, indices


def _largest(
    bits: _Integers, inside: _Mask, k: int, dtype: jnp.dtype
) -> tuple[_Mask, _Integers]:
    """Where the k largest of each row are, and their slots among these.

    All others have the slot k, which there is not: the emulation writes old values back
    where a store is masked.
    """
    if bits.shape[1] <= MAX_ORDERED and k <= _MAX_ROUNDS:
        keep = inside & (_keys_after(k, bits, inside, dtype) < 0)
        slot = jnp.cumsum(keep.astype(jnp.int32), axis=1) - 1
    else:
        magnitude = _magnitude(bits, inside, dtype)
        keep, slot = _largest_by_bits(magnitude, k, _sign_shift(dtype))
    return keep, jnp.where(keep, slot, k)


def _keys_after(k: int, bits: _Integers, inside: _Mask, dtype: jnp.dtype) -> _Integers:
    """The keys, negative for the k largest of each row."""

    def take(_: Any, keys: _Integers) -> _Integers:
        return _next_largest(keys, bits, dtype)[0]

    return _repeat(k, take, _keys(bits, inside, dtype))


def _largest_by_bits(
    magnitude: _Integers, k: int, width: int
) -> tuple[_Mask, _Integers]:
    """`_largest`, by a search for the k-th largest magnitude, highest bit first."""

    def next_bit(i: Any, kth: _Column) -> _Column:
        candidate = kth | jnp.left_shift(1, width - 1 - i)
        enough = (magnitude >= candidate).astype(jnp.int32)
        enough = jnp.sum(enough, axis=1, keepdims=True) >= k
        return jnp.where(enough, candidate, kth)

    kth = jnp.zeros((magnitude.shape[0], 1), jnp.int32)
    kth = lax.fori_loop(0, width, next_bit, kth)
    above = (magnitude > kth).astype(jnp.int32)
    equal = (magnitude == kth).astype(jnp.int32)
    room = k - jnp.sum(above, axis=1, keepdims=True)
    # Both counts in one prefix sum: neither exceeds 2**14.
    so_far = jnp.cumsum(above << 16 | equal, axis=1)
    above_so_far, equal_so_far = so_far >> 16, so_far & 0xFFFF
    keep = (above > 0) | ((equal > 0) & (equal_so_far <= room))
    return keep, above_so_far + jnp.minimum(equal_so_far, room) - 1


def _words(
    codes: _Integers | _Mask, place: _Integers, bits: int
) -> list[UInt32[Array, "rows 1"]]:
    """The codes of each row in words of 32 bits, the first in the lowest bits."""
    shifted = codes.astype(jnp.uint32) << (place * bits & 31).astype(jnp.uint32)
    count = -(-codes.shape[1] * bits // 32)
    if count == 1:
        return [jnp.sum(shifted, axis=1, keepdims=True)]
    return [
        jnp.sum(jnp.where(place * bits >> 5 == i, shifted, 0), axis=1, keepdims=True)
        for i in range(count)
    ]


def _store_packed(
    ref: Any, words: list[UInt32[Array, "rows 1"]], bits: int, plan: Plan, units: int
) -> None:
    """Stores `bits` of each chunk, given in words, side by side in the unit's bytes."""
    rows = words[0].shape[0] // plan.unit
    shape = (rows, plan.unit, power_of_two(ref.shape[1]))
    chunk = lax.broadcasted_iota(jnp.int32, shape, 1)
    byte = lax.broadcasted_iota(jnp.int32, shape, 2)
    packed = jnp.zeros(shape, jnp.uint32)
    for i, column in enumerate(words):
        word = column.reshape(rows, plan.unit, 1)
        # Where the byte begins, counted in bits from the word's beginning.
        start = 8 * byte - chunk * bits - 32 * i
        right = word >> jnp.clip(start, 0, 31).astype(jnp.uint32)
        left = word << jnp.clip(-start, 0, 31).astype(jnp.uint32)
        part = jnp.where(start >= 0, right, left)
        packed |= jnp.where((start > -8) & (start < 32), part, 0)
    packed = jnp.sum(packed & 0xFF, axis=1)
    row, column = _places(packed.shape)
    inside = (pl.program_id(0) * rows + row < units) & (column < ref.shape[1])
    _store(ref, row, column, packed, inside)


def _store_bytes(
    ref: Any, mask: _Mask, start: Any, size: int, open_byte: _Column
) -> _Column:
    """Stores the whole bytes of a mask that begins at a bit of the unit.

    Args:
      ref: the bytes of the unit.
      mask: 8 columns a byte, the first byte the one in which the bit `start` is.
      start: where the chunk begins, in bits.
      size: elements of the chunk.
      open_byte: what chunks before have in the first byte.

    Returns:
      What this chunk and those before have in the byte after the last whole one.
    """
    octets = mask.astype(jnp.int32).reshape(1, mask.shape[1] // 8, 8)
    octets = octets << lax.broadcasted_iota(jnp.int32, octets.shape, 2)
    octets = jnp.sum(octets, axis=2)
    row, column = _places(octets.shape)
    octets = jnp.where(column == 0, octets | open_byte, octets)
    whole = ((start & 7) + size) >> 3
    _store(ref, row, (start >> 3) + column, octets, column < whole)
    return jnp.sum(jnp.where(column == whole, octets, 0), axis=1, keepdims=True)
