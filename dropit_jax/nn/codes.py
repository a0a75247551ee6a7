"""A small integer for every element, packed, as what a backward pass reads."""

import dataclasses
import functools
from collections.abc import Callable

import jax
from jax import lax
from jaxtyping import Array, Float, Shaped, UInt8

from dropit_jax import chunking, packing, shardings


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("packed",),
    meta_fields=("bits", "group"),
)
@dataclasses.dataclass(frozen=True)
class Codes:
    """Packed integers, one for each element of an array.

    Attributes:
      packed: the integers.
      bits: of each.
      group: what is sharded like the array.
    """

    packed: UInt8[Array, "*rows bytes"]
    bits: int
    group: int


def store(
    x: Float[Array, "*shape"],
    code: Callable[[Array], Shaped[Array, "*shape"]],
    bits: int,
) -> tuple[Float[Array, "*shape"], Codes]:
    """The array to go on with, and the codes of its elements.

    Args:
      x: an array.
      code: gives each element its code, in [0, 2**bits).
      bits: 1, 2, 4 or 8.
    """
    group = shardings.new_group()
    x = shardings.join(x, group)
    rows = chunking.as_rows(code(x), chunking.cut(x.shape, 8 // bits))
    return x, Codes(packing.pack(rows, bits), bits, group)


def load(
    codes: Codes, cotangent: Float[Array, "*shape"]
) -> tuple[UInt8[Array, "*shape"], Float[Array, "*shape"]]:
    """The codes of an array, and the cotangent of the same shape to go on with."""
    # Without the barrier XLA may unpack early and keep what is unpacked alive.
    packed, cotangent = lax.optimization_barrier((codes.packed, cotangent))
    rows = chunking.cut(cotangent.shape, 8 // codes.bits)
    unpacked = packing.unpack(packed, codes.bits, rows.row_size)
    unpacked = shardings.like(unpacked.reshape(cotangent.shape), cotangent)
    return shardings.join(unpacked, codes.group), cotangent
