"""Residuals of one small integer, a code, for each element of an array.

The packed codes have a `checkpoint_name`, for the policies of `jax.checkpoint`
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
from dropit_jax.xla import barriers, cpu_calls, shardings
from dropit_jax.xla.platforms import by_platform


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("packed",),
    meta_fields=("bits", "group"),
)
@dataclasses.dataclass(frozen=True)
class ElementCodes:
    """Packed codes, one for each element of an array.

    Attributes:
      packed: the packed codes: one bit each for the shape `(8, 64)` is `(8, 8)` bytes.
      bits: the bits of a code.
      group: the number of the array's sharding group.
    """

    packed: UInt[Array, "*rows bytes"]
    bits: int
    group: int


def store(
    x: Float[Array, "*shape"],
    code: Callable[[Array], Shaped[Array, "*shape"]],
    bits: int,
    name: str = "codes",
) -> tuple[Float[Array, "*shape"], ElementCodes]:
    """Returns `x`, sharded like its codes, and the packed codes of its elements.

    Use the returned array in place of `x`.

    Args:
      x: an array.
      code: a function of `x` that returns the code of each element, in [0, 2**bits),
        and closes over no traced array. JAX reuses the trace of an equal function.
      bits: the bits of a code: 1, 2, 4, 8 or 16.
      name: the `checkpoint_name` of the packed codes.
    """
    group = shardings.new_group()
    x = shardings.join_group(x, group)
    return x, _packed(x, code, bits, group, name)


def store_apart(
    x: Inexact[Array, "*shape"], code: Shaped[Array, "*shape"], bits: int, name: str
) -> tuple[Inexact[Array, "*shape"], ElementCodes]:
    """Returns `x` with given codes, which need not be computed from `x`.

    Use the returned array in place of `x`, as it is sharded like the codes.

    Args:
      x: an array.
      code: the codes, in [0, 2**bits).
      bits: as in `store`.
      name: the `checkpoint_name` of the packed codes.
    """
    group = shardings.new_group()
    x = shardings.join_group(x, group)
    code = shardings.join_group(shardings.reshard_like(code, x), group)
    return x, _packed(code, _unchanged, bits, group, name)


def load(
    codes: ElementCodes, cotangent: Inexact[Array, "*shape"]
) -> UInt[Array, "*shape"]:
    """Returns the codes of an array in its shape; unpacks them after the cotangent.

    Args:
      codes: the packed codes.
      cotangent: the cotangent of the array.
    """
    # Otherwise XLA may unpack early, and keep the unpacked codes in memory.
    packed = barriers.read_after(cotangent, codes.packed)
    unpacked = _unpacked(packed, cotangent, codes.bits, cotangent.shape)
    unpacked = shardings.reshard_like(unpacked, cotangent)
    return shardings.join_group(unpacked, codes.group)


def apply(
    codes: ElementCodes,
    cotangent: Inexact[Array, "*shape"],
    function: Callable[[Array, Array], Array],
) -> Inexact[Array, "*shape"]:
    """Returns `function(load(codes, cotangent), cotangent)`, computed in one loop.

    Args:
      codes: the packed codes of the array.
      cotangent: the cotangent of the array.
      function: a function of two arrays, element by element, that closes over no
        traced array. JAX reuses the trace of an equal function.
    """
    packed = barriers.read_after(cotangent, codes.packed)
    applied = _applied(packed, cotangent, codes.bits, function)
    return shardings.join_group(applied, codes.group)


def _packed(
    x: Array, code: Callable[[Array], Array], bits: int, group: int, name: str
) -> ElementCodes:
    # The function of codes of whole bytes may differ for each layer: no shared call.
    pack = _packed_rows if bits >= 8 else _packed_in_call
    return ElementCodes(checkpoint_name(pack(x, code, bits), name), bits, group)


def _packed_rows(x: Array, code: Callable[[Array], Array], bits: int) -> Array:
    return _pack(chunking.as_rows(code(x), _rows(x.shape, bits)), bits)


# Jitted, so that all layers of one shape share one trace, for one `code` function.
@functools.partial(jax.jit, static_argnames=("code", "bits"), inline=True)
def _packed_in_call(x: Array, code: Callable[[Array], Array], bits: int) -> Array:
    pack = functools.partial(_packed_rows, code=code, bits=bits)
    # Fused with the operations around, packing becomes vector instructions that take
    # long to compile for a CPU, in every layer. XLA compiles equal loops only once.
    return by_platform(pack, cpu=cpu_calls.not_inlined(pack))(x)


# Jitted, so that all layers of one shape share one trace.
@functools.partial(jax.jit, static_argnames=("bits", "shape"), inline=True)
def _unpacked(packed: Array, cotangent: Array, bits: int, shape: Shape) -> Array:
    def unpacked(packed: Array) -> Array:
        return _unpack(packed, bits, _rows(shape, bits).row_size).reshape(shape)

    # Codes of whole bytes need no unpacking, and no call.
    return barriers.call_after(cotangent if bits < 8 else None, unpacked, packed)


# Jitted, so that all layers of one shape share one trace.
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

    in_call = cpu_calls.not_inlined(applied)
    return by_platform(applied, cpu=in_call)(packed, cotangent)


def _unchanged(code: Array) -> Array:
    return code


def _rows(shape: Shape, bits: int) -> chunking.Chunking:
    """Returns the rows of an array, in chunks that fill a byte with codes."""
    return chunking.chunking_of(shape, max(1, 8 // bits))


def _pack(rows: Array, bits: int) -> Array:
    return rows.astype(jnp.uint16) if bits == 16 else packing.pack(rows, bits)


def _unpack(packed: Array, bits: int, count: int) -> Array:
    return packed if bits == 16 else packing.unpack(packed, bits, count)
