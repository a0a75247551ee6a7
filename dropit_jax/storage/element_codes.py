"""A small integer for every element, packed, as what a backward pass reads.

What is packed has a name for the policies of `jax.checkpoint`
(`jax.checkpoint_policies.save_only_these_names`).
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Inexact, Shaped, UInt

from dropit_jax.storage import chunking, packing
from dropit_jax.storage.shapes import Shape
from dropit_jax.xla import barriers, calls, shardings
from dropit_jax.xla.platforms import by_platform


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

    packed: UInt[Array, "*rows bytes"]
    bits: int
    group: int


def store(
    x: Float[Array, "*shape"],
    code: Callable[[Array], Shaped[Array, "*shape"]],
    bits: int,
    name: str = "codes",
) -> tuple[Float[Array, "*shape"], Codes]:
    """The array to go on with, and the codes of its elements.

    Args:
      x: an array.
      code: gives each element its code, in [0, 2**bits).
      bits: 1, 2, 4, 8 or 16.
      name: of the packed codes.
    """
    group = shardings.new_group()
    x = shardings.join_group(x, group)
    return x, _packed(x, code, bits, group, name)


def store_apart(
    x: Inexact[Array, "*shape"], code: Shaped[Array, "..."], bits: int, name: str
) -> tuple[Inexact[Array, "*shape"], Shaped[Array, "*shape"], Codes]:
    """The array and its codes to go on with, where these are not computed from it.

    Args:
      x: an array.
      code: in [0, 2**bits); of a shape that broadcasts to that of `x`, where a code
        stands for more than one element.
      bits: as in `store`.
      name: of the packed codes.

    Returns:
      `x`, the code of each of its elements, and the codes packed.
    """
    group = shardings.new_group()
    x = shardings.join_group(x, group)
    each = shardings.reshard_like(jnp.broadcast_to(code, x.shape), x)
    each = shardings.join_group(each, group)
    if code.shape == x.shape:
        code = each
    return x, each, _packed(code, _unchanged, bits, group, name)


def load(
    codes: Codes,
    cotangent: Inexact[Array, "*shape"],
    shape: Shape | None = None,
) -> UInt[Array, "*shape"]:
    """The codes of an array, not unpacked before its cotangent is computed.

    Args:
      codes: what was stored.
      cotangent: of the array.
      shape: of the codes, where it is not the array's.
    """
    # Else XLA may unpack early and keep what is unpacked alive.
    packed = barriers.read_after(cotangent, codes.packed)
    shape = cotangent.shape if shape is None else shape
    unpacked = _unpacked(packed, cotangent, codes.bits, shape)
    unpacked = jnp.broadcast_to(unpacked, cotangent.shape)
    unpacked = shardings.reshard_like(unpacked, cotangent)
    return shardings.join_group(unpacked, codes.group)


def apply(
    codes: Codes,
    cotangent: Inexact[Array, "*shape"],
    function: Callable[[Array, Array], Array],
) -> Inexact[Array, "*shape"]:
    """`function(code, cotangent)`, element by element, as one loop.

    Args:
      codes: what was stored of the array.
      cotangent: of the array.
      function: of `load(codes, cotangent)` and the cotangent; one that equals it is the
        same to JAX.
    """
    packed = barriers.read_after(cotangent, codes.packed)
    applied = _applied(packed, cotangent, codes.bits, function)
    return shardings.join_group(applied, codes.group)


def _packed(
    x: Array, code: Callable[[Array], Array], bits: int, group: int, name: str
) -> Codes:
    # The code of a byte may be of one layer alone.
    pack = _packed_rows if bits >= 8 else _packed_in_call
    return Codes(checkpoint_name(pack(x, code, bits), name), bits, group)


def _packed_rows(x: Array, code: Callable[[Array], Array], bits: int) -> Array:
    return _pack(chunking.as_rows(code(x), _rows(x.shape, bits)), bits)


# Traced once for all layers of one shape; codes are compared by identity.
@functools.partial(jax.jit, static_argnames=("code", "bits"), inline=True)
def _packed_in_call(x: Array, code: Callable[[Array], Array], bits: int) -> Array:
    pack = functools.partial(_packed_rows, code=code, bits=bits)
    # In one loop with what is before or after, they are vector instructions that take
    # long to compile for a CPU, and are compiled for each layer anew: XLA compiles two
    # loops once only where they are the same.
    return by_platform(pack, cpu=calls.not_inlined(pack))(x)


# Likewise.
@functools.partial(jax.jit, static_argnames=("bits", "shape"), inline=True)
def _unpacked(packed: Array, cotangent: Array, bits: int, shape: Shape) -> Array:
    def unpacked(packed: Array) -> Array:
        return _unpack(packed, bits, _rows(shape, bits).row_size).reshape(shape)

    # Whole bytes are read by what they are used for.
    return barriers.call_after(cotangent if bits < 8 else None, unpacked, packed)


# Likewise.
@functools.partial(jax.jit, static_argnames=("bits", "function"), inline=True)
def _applied(
    packed: Array,
    cotangent: Array,
    bits: int,
    function: Callable[[Array, Array], Array],
) -> Array:
    def applied(packed: Array, cotangent: Array) -> Array:
        shape = cotangent.shape
        code = _unpack(packed, bits, _rows(shape, bits).row_size).reshape(shape)
        return function(shardings.reshard_like(code, cotangent), cotangent)

    in_call = calls.not_inlined(applied)
    return by_platform(applied, cpu=in_call)(packed, cotangent)


def _unchanged(code: Array) -> Array:
    return code


def _rows(shape: Shape, bits: int) -> chunking.Chunking:
    """Rows of whole bytes."""
    return chunking.chunking_of(shape, max(1, 8 // bits))


def _pack(rows: Array, bits: int) -> Array:
    return rows.astype(jnp.uint16) if bits == 16 else packing.pack(rows, bits)


def _unpack(packed: Array, bits: int, count: int) -> Array:
    return packed if bits == 16 else packing.unpack(packed, bits, count)
