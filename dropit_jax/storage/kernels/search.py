"""The search for the largest elements of chunks, in the registers of a GPU kernel.

A block is (rows, columns), with one chunk in each row. Elements are given by their
bits, and `inside` masks the columns that pad a chunk.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from dropit_jax.storage.kernels.chunk_storage import MAX_ORDERED, power_of_two

_Carry = TypeVar("_Carry")
_Integers = Int32[Array, "rows columns"]
_Column = Int32[Array, "rows 1"]
_Mask = Bool[Array, "rows columns"]

# Up to this k, taking the maximum k times costs no more than searching for the k-th
# largest magnitude bit by bit.
_MAX_ROUNDS = 15

# The most rounds that are unrolled; more are a loop.
_MAX_UNROLLED = 8


def places(shape: tuple[int, ...]) -> tuple[_Integers, _Integers]:
    """Returns the row and the column of each element of a block."""
    return (
        lax.broadcasted_iota(jnp.int32, shape, 0),
        lax.broadcasted_iota(jnp.int32, shape, 1),
    )


def _sign_shift(dtype: jnp.dtype) -> int:
    return 8 * dtype.itemsize - 1


def _magnitude(bits: _Integers, inside: _Mask, dtype: jnp.dtype) -> _Integers:
    """Returns integers in the order of the magnitudes; -1 for padding."""
    return jnp.where(inside, bits & ((1 << _sign_shift(dtype)) - 1), -1)


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
    """Returns integers whose maximum is at the largest element; -1 for padding.

    Keys of 32-bit floats are the magnitudes. Keys of 16-bit floats are all different,
    and ties go to the lower column: magnitude << 16 | (63 - column) << 1 | sign.
    """
    magnitude = _magnitude(bits, inside, dtype)
    if dtype.itemsize == 4:
        return magnitude
    column = places(bits.shape)[1]
    tag = (MAX_ORDERED - 1 - column) << 1 | bits >> 15
    return jnp.where(inside, magnitude << 16 | tag, -1)


def _next_largest(
    keys: _Integers, bits: _Integers, dtype: jnp.dtype
) -> tuple[_Integers, _Column, _Column]:
    """Finds the largest key of each row.

    Returns the keys with -1 in its place, the bits of its element, and its column.
    """
    column = places(keys.shape)[1]
    top = jnp.max(keys, axis=1, keepdims=True)
    if dtype.itemsize == 2:
        taken, tag = top >> 16 | (top & 1) << 15, top >> 1 & (MAX_ORDERED - 1)
        index = MAX_ORDERED - 1 - tag
    else:
        # One minimum finds the lowest column of equal keys, and the sign there.
        signed = column << 1 | (bits < 0).astype(jnp.int32)
        signed = jnp.where(keys == top, signed, 2 * MAX_ORDERED)
        first = jnp.min(signed, axis=1, keepdims=True)
        taken, index = top | first << 31, first >> 1
    return jnp.where(column == index, -1, keys), taken, index


def largest_first(
    bits: _Integers, inside: _Mask, k: int, dtype: jnp.dtype
) -> tuple[_Integers, _Integers]:
    """Returns the bits and the indices of the k largest of each row, largest first.

    Ties go to the lower index. There are at most `MAX_ORDERED` columns. Rows of the
    result are padded with zeros: (rows, columns) -> (rows, power_of_two(k)).
    """
    slot = places((bits.shape[0], power_of_two(k)))[1]

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


def largest(
    bits: _Integers, inside: _Mask, k: int, dtype: jnp.dtype
) -> tuple[_Mask, _Integers]:
    """Returns the mask of the k largest of each row, and their slots, 0 to k - 1.

    All other elements have the slot k, which does not exist: where a store is masked,
    the emulation writes the old value back, and must not do so to a slot that is used.
    """
    if bits.shape[1] <= MAX_ORDERED and k <= _MAX_ROUNDS:
        keep = inside & (_keys_left(k, bits, inside, dtype) < 0)
        slot = jnp.cumsum(keep.astype(jnp.int32), axis=1) - 1
    else:
        magnitude = _magnitude(bits, inside, dtype)
        keep, slot = _largest_by_bits(magnitude, k, _sign_shift(dtype))
    return keep, jnp.where(keep, slot, k)


def _keys_left(k: int, bits: _Integers, inside: _Mask, dtype: jnp.dtype) -> _Integers:
    """Returns `_keys`, with -1 for the k largest of each row as for padding."""

    def take(_: Any, keys: _Integers) -> _Integers:
        return _next_largest(keys, bits, dtype)[0]

    return _repeat(k, take, _keys(bits, inside, dtype))


def _largest_by_bits(
    magnitude: _Integers, k: int, width: int
) -> tuple[_Mask, _Integers]:
    """Finds the k largest by the k-th largest magnitude, built from its highest bit.

    Args:
      magnitude: integers of `width` bits; -1 for padding.
      k: how many to find.
      width: bits of a magnitude, the rounds of the search.

    Returns:
      The mask and the slots; slots outside of the mask mean nothing.
    """

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
