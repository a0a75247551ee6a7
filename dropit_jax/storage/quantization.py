"""Values in few bits: unsigned codes with a minimum and a scale for every group.

Of a group x, with codes of b bits,

    minimum = ⌊min(x)⌋     scale = ⌈(max(x) - minimum) / (2ᵇ - 1)⌉
    code    = round((x - minimum) / scale)
    x̂       = minimum + code · scale,    |x̂ - x| ≤ scale / 2 (stochastic: ≤ scale)

where ⌊·⌋ and ⌈·⌉ round to bfloat16, down and up, so that the codes cover the group; a
scale is no smaller than the smallest normal number of bfloat16.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, BFloat16, Float, Shaped, UInt8

from dropit_jax.storage import chunking, dtypes, last_axis, packing
from dropit_jax.storage.shapes import Shape
from dropit_jax.xla import barriers, calls, shardings
from dropit_jax.xla.platforms import by_platform

# More than a rounding to bfloat16 changes a number by, relative to it.
_MARGIN = 2.0**-8

# Of a group of zeros it is this, which, unlike 0, divides them.
_SMALLEST_SCALE = float(jnp.finfo(jnp.bfloat16).tiny)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "minimum", "scale"),
    meta_fields=("shape", "bits", "group_size"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class Quantized:
    """An array in few bits.

    Attributes:
      codes: packed, group after group.
      minimum: of each group.
      scale: of each group, what a step of the code stands for.
      shape: the array's shape.
      bits: of a code.
      group_size: elements that share a minimum and a scale.
    """

    codes: UInt8[Array, "*rows bytes"]
    minimum: BFloat16[Array, "*rows groups"]
    scale: BFloat16[Array, "*rows groups"]
    shape: Shape
    bits: int
    group_size: int

    @functools.partial(jax.jit, static_argnames="dtype", inline=True)
    def dequantize(
        self,
        dtype: jax.typing.DTypeLike,
        after: Shaped[Array, "..."] | None = None,
    ) -> Float[Array, "*shape"]:
        """The array that the codes stand for.

        A group with NaN, infinity or a range that float32 does not hold is NaN.

        Args:
          dtype: the result's.
          after: an array; on a CPU the result is not computed before it is. `None`: as
            part of what the result is used for, if XLA likes.
        """
        rows = functools.partial(
            _dequantized_rows,
            shape=self.shape,
            bits=self.bits,
            group_size=self.group_size,
            dtype=dtype,
        )
        groups = chunking.cut(self.shape, self.group_size)
        ranges = (_without_groups(x, groups) for x in (self.minimum, self.scale))
        values = barriers.computed_after(after, rows, self.codes, *ranges)
        return values.reshape(self.shape)


# Traced once, whatever it is to wait for.
@functools.partial(
    jax.jit, static_argnames=("shape", "bits", "group_size", "dtype"), inline=True
)
def _dequantized_rows(
    codes: UInt8[Array, "*rows bytes"],
    minimum: BFloat16[Array, "..."],
    scale: BFloat16[Array, "..."],
    *,
    shape: Shape,
    bits: int,
    group_size: int,
    dtype: jax.typing.DTypeLike,
) -> Float[Array, "*rows elements"]:
    """The dequantised values, in the rows that groups are cut from."""
    groups = chunking.cut(shape, group_size)
    codes = packing.unpack(codes, bits, groups.row_size)
    compute = dtypes.wide(dtype)
    segments = [
        low + code.astype(compute) * step
        for code, low, step in zip(
            _in_groups(codes, groups),
            _of_each(minimum.astype(compute), groups),
            _of_each(scale.astype(compute), groups),
            strict=True,
        )
    ]
    values = _in_rows(segments, groups)
    if compute == dtype:
        return values
    # The last code may stand for a little more than the largest of its group, and
    # that for more than the type holds.
    largest = jnp.finfo(dtype).max.astype(compute)
    clipped = jnp.clip(values, -largest, largest)
    values = jnp.where(jnp.isinf(values), values, clipped)
    return values.astype(dtype)


def _of_each(x: Array, groups: chunking.Chunking) -> list[Array]:
    """Repeats numbers of groups for their elements, for every segment."""
    if _rows_are_groups(groups):
        return [last_axis.spread(x, groups.size)]
    counts, sizes = zip(*groups.segments, strict=True)
    parts = jnp.split(x, np.cumsum(counts)[:-1], axis=-1) if groups.tail else [x]
    return [last_axis.spread(*each) for each in zip(parts, sizes, strict=True)]


def _rows_are_groups(groups: chunking.Chunking) -> bool:
    """Whether there is one group in a row, which then needs no axis of groups.

    Without it heads, each a row of one group, take the same loops on a CPU as the
    groups of a row of all heads, and these are compiled once.
    """
    return groups.count == 1 and not groups.tail


def _without_groups(x: Array, groups: chunking.Chunking) -> Array:
    """What groups have, without their axis where it has one element."""
    return lax.squeeze(x, (x.ndim - 1,)) if _rows_are_groups(groups) else x


def _in_groups(rows: Array, groups: chunking.Chunking) -> list[Array]:
    """The groups of rows, in segments."""
    return [rows] if _rows_are_groups(groups) else chunking.split(rows, groups.segments)


def _in_rows(segments: list[Array], groups: chunking.Chunking) -> Array:
    """The inverse of `_in_groups`."""
    return segments[0] if _rows_are_groups(groups) else chunking.join(segments)


# As `dequantize`, traced once for all layers of one shape.
@functools.partial(jax.jit, static_argnames=("bits", "group_size"), inline=True)
def quantize(
    x: Float[Array, "*shape"], bits: int, group_size: int, key: Array | None = None
) -> Quantized:
    """Stores an array in codes of 2, 4 or 8 bits.

    Args:
      x: an array; groups are consecutive elements of a slice along its leading axis.
      bits: of a code.
      group_size: elements that share a minimum and a scale.
      key: rounds stochastically, without bias; `None` rounds to nearest.
    """
    stored = functools.partial(_stored, bits=bits, group_size=group_size)
    operands = (x,) if key is None else (x, key)
    operation = by_platform(stored, cpu=calls.not_inlined(stored))
    codes, minimum, scale = operation(*operands)
    if _rows_are_groups(chunking.cut(x.shape, group_size)):
        minimum, scale = (lax.expand_dims(x, (x.ndim,)) for x in (minimum, scale))
    return Quantized(codes, minimum, scale, x.shape, bits, group_size)


def _stored(
    x: Float[Array, "*shape"], key: Array | None = None, *, bits: int, group_size: int
) -> tuple[Array, Array, Array]:
    """Codes, minimum and scale, these `_without_groups`."""
    groups = chunking.cut(x.shape, group_size)
    levels = 2**bits - 1
    rows = chunking.as_rows(x, groups)
    rows = rows.astype(dtypes.wide(x.dtype))
    segments = _in_groups(rows, groups)
    noise = _noise(key, rows, groups)
    found = [ranges(values, levels) for values in segments]
    codes = [
        _codes(values, *of_group, offset, levels)
        for values, of_group, offset in zip(segments, found, noise, strict=True)
    ]
    minimum, scale = (
        chunking.concatenate(of_groups).astype(jnp.bfloat16)
        for of_groups in zip(*found, strict=True)
    )
    return packing.pack(_in_rows(codes, groups), bits), minimum, scale


def _noise(
    key: Array | None, rows: Array, groups: chunking.Chunking
) -> list[Array | None]:
    """What is added before a code is cut off, of every segment; `None`: a half."""
    if key is None:
        return [None] * len(groups.segments)
    uniform = jax.random.uniform(key, rows.shape, rows.dtype)
    return [*_in_groups(shardings.like(uniform, rows), groups)]


def _codes(
    values: Array, minimum: Array, scale: Array, noise: Array | None, levels: int
) -> Array:
    """The codes of the elements of groups."""
    size = values.shape[-1]
    above = values - last_axis.spread(minimum, size)
    steps = above * last_axis.spread(1 / scale, size)
    # Not negative, so that the cast, which cuts off the fraction, rounds down. They are
    # `levels` at most, but for a rounding of float32: with a half more they stay below
    # the next number, which with noise they may reach.
    steps = steps + 0.5 if noise is None else jnp.minimum(steps + noise, levels)
    return steps.astype(jnp.uint8)


def ranges(values: Array, levels: int) -> tuple[Array, Array]:
    """Minimum and scale along the last axis, as numbers that bfloat16 has exactly."""
    smallest, largest = values.min(axis=-1), values.max(axis=-1)
    minimum = _bfloat16(smallest - _MARGIN * jnp.abs(smallest))
    scale = _bfloat16((largest - minimum) * ((1 + _MARGIN) / levels))
    return minimum, jnp.maximum(scale, _SMALLEST_SCALE)


def _bfloat16(x: Array) -> Array:
    # Not a cast and back, which XLA may take for nothing.
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
