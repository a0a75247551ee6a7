"""The storage of chunks by GPU kernels, and the types and sizes they support."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer

from dropit_jax.storage.shapes import Shape

# The largest D whose kept elements are stored in the order of their magnitudes.
MAX_ORDERED = 64

# The largest D; `search` counts the elements of a chunk in 16 bits.
_MAX_SIZE = 2**14

# The most positions: Pallas addresses an array of up to 2**32 bytes by signed 32-bit
# numbers.
_MAX_STORED = 2**31

# The most chunks: programs count them in signed 32-bit numbers, with room for one more
# block.
_MAX_CHUNKS = 2**30

_FLOATS = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class ChunkStorage:
    """The storage of chunks.

    Positions are stored unit by unit, as a chunk may end within a byte. With D = 12,
    k = 3 and indices of 4 bits a chunk has 12 bits of positions, so 2 chunks are a
    unit, and indices 1, 2, 3 and 4, 5, 6 are the 3 bytes 0x21, 0x43, 0x65.

    Attributes:
      size: elements of a chunk, D.
      kept: kept elements of a chunk, k.
      encoding: how positions are stored: `"index"`, one index for each kept element,
        of 4 bits if D <= 16, else of the smallest unsigned type that holds D - 1; or
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
        """The bits of an index."""
        return next(bits for bits in (4, 8, 16, 32) if self.size <= 2**bits)

    @property
    def packed(self) -> bool:
        """Returns whether several positions share a byte."""
        return self.encoding == "bitmap" or self.index_bits < 8

    @property
    def ordered(self) -> bool:
        """Returns whether kept elements are stored in descending order of magnitude."""
        return self.encoding == "index" and self.size <= MAX_ORDERED

    @property
    def unit(self) -> int:
        """The smallest number of chunks whose positions fill whole bytes."""
        return 8 // math.gcd(8, self._position_bits)

    @property
    def positions(self) -> int:
        """The number of bytes (if packed) or indices that store a unit's positions."""
        return self.unit * self._position_bits // 8 if self.packed else self.kept

    @property
    def position_dtype(self) -> jnp.dtype:
        """The type of stored positions."""
        return jnp.dtype("uint8" if self.packed else f"uint{self.index_bits}")

    @property
    def _position_bits(self) -> int:
        """The bits of a chunk's positions."""
        if self.encoding == "bitmap":
            return self.size
        return self.kept * self.index_bits


def supported(x_dtype: jax.typing.DTypeLike, storage: ChunkStorage) -> bool:
    """Returns whether there are GPU kernels for this storage and type of activation."""
    return (
        jnp.dtype(x_dtype).name in _FLOATS
        and storage.value_dtype in _FLOATS
        and storage.encoding in ("index", "bitmap")
        and 2 <= storage.size <= _MAX_SIZE
        and 1 <= storage.kept < storage.size
    )


def fits(storage: ChunkStorage, units: int) -> bool:
    """Returns whether a GPU kernel can count the chunks and address their positions.

    `False` for a symbolic number of units (`jax.export`), whose value is not known.
    """
    if jax.export.is_symbolic_dim(units):
        return False
    return (
        units * storage.positions <= _MAX_STORED and units * storage.unit < _MAX_CHUNKS
    )


def check(dtype: jax.typing.DTypeLike, storage: ChunkStorage, units: int) -> None:
    """Checks that there is a GPU kernel for this type, storage and number of units.

    Raises:
      ValueError: there is no such kernel.
    """
    if not supported(dtype, storage):
        raise ValueError(
            f"There is no kernel for {jnp.dtype(dtype).name} and {storage}."
        )
    if not fits(storage, units):
        raise ValueError(f"There is no kernel for {units} units of {storage}.")


def bits_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Returns the integer type for the bits of a float type of 16 or 32 bits."""
    return jnp.dtype("int32" if jnp.dtype(dtype).itemsize == 4 else "uint16")


def to_bits(x: Float[Array, "*shape"]) -> Integer[Array, "*shape"]:
    """Returns the bits of floats as integers, which no float operation can change.

    XLA reinterprets the array without a copy.
    """
    return lax.bitcast_convert_type(x, bits_dtype(x.dtype))


def from_bits(
    bits: Integer[Array, "*shape"], dtype: jax.typing.DTypeLike
) -> Float[Array, "*shape"]:
    """Returns the floats of these bits; of wider integers, only the lowest bits."""
    return lax.bitcast_convert_type(bits.astype(bits_dtype(dtype)), dtype)


def cast_bits(
    bits: Integer[Array, "*shape"],
    dtype: jax.typing.DTypeLike,
    new_dtype: jax.typing.DTypeLike,
) -> Integer[Array, "*shape"]:
    """Casts floats that are given as bits, and returns the bits of the results."""
    if jnp.dtype(dtype) == jnp.dtype(new_dtype):
        return bits
    return to_bits(from_bits(bits, dtype).astype(new_dtype))


def result(
    shape: Shape, dtype: jax.typing.DTypeLike, like: Array
) -> jax.ShapeDtypeStruct:
    """Returns the type of a GPU kernel's result.

    Within `jax.shard_map` it varies along the same axes of the mesh as `like`.
    """
    varying = jax.typeof(like).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying)


def power_of_two(count: int) -> int:
    """Returns the smallest power of two that is at least `count`: 5 -> 8."""
    return 1 << max(0, count - 1).bit_length()
