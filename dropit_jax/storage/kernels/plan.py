"""The task of a kernel, and the types and sizes for which there are kernels."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer

from dropit_jax.storage.shapes import Shape

# The largest chunk whose indices are stored in the order of magnitude.
MAX_ORDERED = 64

_MAX_SIZE = 2**14

# The most positions: Pallas addresses an array of up to 2**32 bytes by signed numbers
# of 32 bits.
_MAX_STORED = 2**31

# Programs count chunks by signed numbers of 32 bits, with room for a block more.
_MAX_CHUNKS = 2**30

_FLOATS = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How chunks are stored.

    Attributes:
      size: elements of a chunk, D.
      kept: elements kept of each, k.
      encoding: how positions are stored: `"index"`, one index for each kept element,
        of 4 bits if D <= 16, else of the smallest unsigned type that holds D; or
        `"bitmap"`, one bit for each element. Kept elements are in the order of their
        indices, but largest first where indices are stored and D <= `MAX_ORDERED`.
      value_dtype: the name of the type that kept values are stored in.
    """

    size: int
    kept: int
    encoding: Literal["index", "bitmap"]
    value_dtype: str

    @property
    def index_bits(self) -> int:
        """Bits of an index."""
        return next(bits for bits in (4, 8, 16, 32) if self.size <= 2**bits)

    @property
    def packed(self) -> bool:
        """Whether positions are parts of bytes."""
        return self.encoding == "bitmap" or self.index_bits < 8

    @property
    def ordered(self) -> bool:
        """Whether kept elements are stored largest first."""
        return self.encoding == "index" and self.size <= MAX_ORDERED

    @property
    def unit(self) -> int:
        """The smallest number of chunks whose positions fill whole bytes."""
        return 8 // math.gcd(8, self._position_bits)

    @property
    def positions(self) -> int:
        """Stored positions of a unit: bytes where they are packed, else indices."""
        return self.unit * self._position_bits // 8 if self.packed else self.kept

    @property
    def position_dtype(self) -> jnp.dtype:
        """The type of stored positions."""
        return jnp.dtype("uint8" if self.packed else f"uint{self.index_bits}")

    @property
    def _position_bits(self) -> int:
        """Bits of the positions of a chunk."""
        if self.encoding == "bitmap":
            return self.size
        return self.kept * self.index_bits


def supported(x_dtype: jax.typing.DTypeLike, plan: Plan) -> bool:
    """Whether there are kernels for activations of this type and for this plan."""
    return (
        jnp.dtype(x_dtype).name in _FLOATS
        and plan.value_dtype in _FLOATS
        and plan.encoding in ("index", "bitmap")
        and 2 <= plan.size <= _MAX_SIZE
        and 1 <= plan.kept < plan.size
    )


def fits(plan: Plan, units: int) -> bool:
    """Whether a kernel can count the chunks, and address what is stored of them.

    Of a number that is a symbol (`jax.export`) nobody knows.
    """
    if jax.export.is_symbolic_dim(units):
        return False
    return units * plan.positions <= _MAX_STORED and units * plan.unit < _MAX_CHUNKS


def check(dtype: jax.typing.DTypeLike, plan: Plan, units: int) -> None:
    """Refuses what there is no kernel for.

    Raises:
      ValueError: there is none.
    """
    if not supported(dtype, plan):
        raise ValueError(f"There is no kernel for {jnp.dtype(dtype).name} and {plan}.")
    if not fits(plan, units):
        raise ValueError(f"There is no kernel for {units} units of {plan}.")


def bits_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The type of integers that hold the bits of floats of this type."""
    return jnp.dtype("int32" if jnp.dtype(dtype).itemsize == 4 else "uint16")


def to_bits(x: Float[Array, "*shape"]) -> Integer[Array, "*shape"]:
    """The bits of floats as integers, which no operation on floats can change.

    XLA takes such integers for the floats without a copy.
    """
    return lax.bitcast_convert_type(x, bits_dtype(x.dtype))


def from_bits(
    bits: Integer[Array, "*shape"], dtype: jax.typing.DTypeLike
) -> Float[Array, "*shape"]:
    """The floats of these bits; of integers wider than the floats, the lowest bits."""
    return lax.bitcast_convert_type(bits.astype(bits_dtype(dtype)), dtype)


def cast_bits(
    bits: Integer[Array, "*shape"],
    dtype: jax.typing.DTypeLike,
    new_dtype: jax.typing.DTypeLike,
) -> Integer[Array, "*shape"]:
    """The bits of the floats of these bits in another type."""
    if jnp.dtype(dtype) == jnp.dtype(new_dtype):
        return bits
    return to_bits(from_bits(bits, dtype).astype(new_dtype))


def result(
    shape: Shape, dtype: jax.typing.DTypeLike, like: Array
) -> jax.ShapeDtypeStruct:
    """A result that, within `jax.shard_map`, differs by device where `like` does."""
    varying = jax.typeof(like).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying)


def power_of_two(count: int) -> int:
    """The smallest power of two that is not below `count`: the size of a block."""
    return 1 << max(0, count - 1).bit_length()
