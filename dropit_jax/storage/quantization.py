"""Quantises arrays: codes of few bits, with a minimum and a scale for each group.

For a group x and codes of b bits:

    minimum = ⌊min(x)⌋     scale = ⌈(max(x) - minimum) / (2ᵇ - 1)⌉
    code    = round((x - minimum) / scale)
    x̂       = minimum + code · scale,    |x̂ - x| ≤ scale / 2 (stochastic: ≤ scale)

⌊·⌋ and ⌈·⌉ round to bfloat16, down and up, so that the codes cover the group. A scale
is at least the smallest normal number of bfloat16.

In 2 bits, the group `[-1, 0, 1, 2]` has minimum -1, scale 1 and codes `[0, 1, 2, 3]`,
packed into the byte `0b11100100`: 5 bytes in place of 16 in float32.
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
from dropit_jax.xla import barriers, cpu_calls, shardings
from dropit_jax.xla.platforms import by_platform

# An upper bound of the relative error of rounding to bfloat16.
_MARGIN = 2.0**-8

# The scale of a group of zeros, which is divided by, so that it must not be 0.
_MIN_SCALE = float(jnp.finfo(jnp.bfloat16).tiny)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "minimum", "scale"),
    meta_fields=("shape", "bits", "group_size"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class Quantized:
    """A quantised array.

    Attributes:
      codes: packed codes, group after group.
      minimum: minimum of each group.
      scale: scale of each group: the step from one code to the next.
      shape: shape of the array.
      bits: bits of a code.
      group_size: elements of a group.
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
        """Returns the array x̂ that the codes represent.

        A group is NaN if it had NaN, infinity, a range beyond float32, or a minimum
        whose rounding down leaves float32 (below -3.38e38).

        Args:
          dtype: dtype of the result.
          after: an array; on a CPU the result is not computed before `after` is.
            `None`: XLA may fuse the computation into the operations that read it.
        """
        rows = functools.partial(
            _dequantized_rows,
            shape=self.shape,
            bits=self.bits,
            group_size=self.group_size,
            dtype=dtype,
        )
        groups = chunking.chunking_of(self.shape, self.group_size)
        ranges = (_squeeze_groups(x, groups) for x in (self.minimum, self.scale))
        values = barriers.call_after(after, rows, self.codes, *ranges)
        return values.reshape(self.shape)


# Jitted apart from `dequantize`, so that every shape of `after` shares one trace.
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
    """Returns x̂ as `(*rows, row_size)`, the rows that groups are cut from.

    `minimum` and `scale` are as `_squeeze_groups` returns them.
    """
    groups = chunking.chunking_of(shape, group_size)
    codes = packing.unpack(codes, bits, groups.row_size)
    compute = dtypes.wide(dtype)
    segments = [
        low + code.astype(compute) * step
        for code, low, step in zip(
            _split_groups(codes, groups),
            _spread_to_elements(minimum.astype(compute), groups),
            _spread_to_elements(scale.astype(compute), groups),
            strict=True,
        )
    ]
    values = _join_groups(segments, groups)
    if compute == dtype:
        return values
    # The last code may represent a value a little above the largest of its group,
    # beyond the range of `dtype`.
    largest = jnp.finfo(dtype).max.astype(compute)
    clipped = jnp.clip(values, -largest, largest)
    values = jnp.where(jnp.isinf(values), values, clipped)
    return values.astype(dtype)


def _spread_to_elements(x: Array, groups: chunking.Chunking) -> list[Array]:
    """Repeats a number per group for each element of the group, in each segment.

    For groups of 64 elements: `(*rows, 3) -> [(*rows, 3, 64)]`.
    """
    if _rows_are_groups(groups):
        return [last_axis.repeat_in_blocks(x, groups.size)]
    counts, sizes = zip(*groups.segments, strict=True)
    parts = jnp.split(x, np.cumsum(counts)[:-1], axis=-1) if groups.tail else [x]
    return [
        last_axis.repeat_in_blocks(*each) for each in zip(parts, sizes, strict=True)
    ]


def _rows_are_groups(groups: chunking.Chunking) -> bool:
    """Returns whether each row is one group, and is computed without a group axis."""
    # Without that axis, attention heads `(8, 16, 4, 64)` in groups of 64 have the shape
    # of all heads in one row, `(8, 16, 256)`, after the split into groups: XLA's CPU
    # compiler compiles the loops of both once.
    return groups.count == 1 and not groups.tail


def _squeeze_groups(x: Array, groups: chunking.Chunking) -> Array:
    """Removes the axis of groups if each row is one group.

    `(*rows, 1) -> (*rows,)`; otherwise `(*rows, groups)` is returned as it is.
    """
    return lax.squeeze(x, (x.ndim - 1,)) if _rows_are_groups(groups) else x


def _split_groups(rows: Array, groups: chunking.Chunking) -> list[Array]:
    """Splits rows into segments of groups; a row of one group stays as it is."""
    return [rows] if _rows_are_groups(groups) else chunking.split(rows, groups.segments)


def _join_groups(segments: list[Array], groups: chunking.Chunking) -> Array:
    """Inverts `_split_groups`."""
    return segments[0] if _rows_are_groups(groups) else chunking.join(segments)


# Jitted, as `dequantize` is, so that all layers of one shape share one trace.
@functools.partial(jax.jit, static_argnames=("bits", "group_size"), inline=True)
def quantize(
    x: Float[Array, "*shape"], bits: int, group_size: int, key: Array | None = None
) -> Quantized:
    """Quantises an array to codes of 2, 4 or 8 bits.

    Args:
      x: an array; groups are consecutive elements of a slice along its leading axis,
        and the last group of a slice may be shorter.
      bits: bits of a code.
      group_size: elements that share a minimum and a scale.
      key: a PRNG key, to round stochastically, without bias; `None` rounds to nearest.
    """
    quantize_rows = functools.partial(_quantize_rows, bits=bits, group_size=group_size)
    operands = (x,) if key is None else (x, key)
    operation = by_platform(quantize_rows, cpu=cpu_calls.not_inlined(quantize_rows))
    codes, minimum, scale = operation(*operands)
    if _rows_are_groups(chunking.chunking_of(x.shape, group_size)):
        minimum, scale = (lax.expand_dims(x, (x.ndim,)) for x in (minimum, scale))
    return Quantized(codes, minimum, scale, x.shape, bits, group_size)


def _quantize_rows(
    x: Float[Array, "*shape"], key: Array | None = None, *, bits: int, group_size: int
) -> tuple[Array, Array, Array]:
    """Returns packed codes, and minimum and scale as `_squeeze_groups` returns them."""
    groups = chunking.chunking_of(x.shape, group_size)
    levels = 2**bits - 1
    rows = chunking.as_rows(x, groups)
    rows = rows.astype(dtypes.wide(x.dtype))
    segments = _split_groups(rows, groups)
    offsets = _offsets(key, rows, groups)
    ranges = [group_ranges(values, levels) for values in segments]
    codes = [
        _codes(values, *group_range, offset, levels)
        for values, group_range, offset in zip(segments, ranges, offsets, strict=True)
    ]
    minimum, scale = (
        chunking.concatenate(segments_values).astype(jnp.bfloat16)
        for segments_values in zip(*ranges, strict=True)
    )
    return packing.pack(_join_groups(codes, groups), bits), minimum, scale


def _offsets(
    key: Array | None, rows: Array, groups: chunking.Chunking
) -> list[Array | None]:
    """Returns the offset added before a code is truncated, for each segment.

    `None` stands for the constant 0.5, which rounds to nearest.
    """
    if key is None:
        return [None] * len(groups.segments)
    uniform = jax.random.uniform(key, rows.shape, rows.dtype)
    return [*_split_groups(shardings.reshard_like(uniform, rows), groups)]


def _codes(
    values: Array, minimum: Array, scale: Array, offsets: Array | None, levels: int
) -> Array:
    """Returns the codes, not packed, of groups along the last axis."""
    size = values.shape[-1]
    shifted = values - last_axis.repeat_in_blocks(minimum, size)
    steps = shifted * last_axis.repeat_in_blocks(1 / scale, size)
    # Steps are not negative, so the cast, which truncates, rounds down. They exceed
    # `levels` at most by a rounding error of float32: with 0.5 added they stay below
    # `levels + 1`, but with a random offset they may reach it.
    steps = steps + 0.5 if offsets is None else jnp.minimum(steps + offsets, levels)
    return steps.astype(jnp.uint8)


def group_ranges(values: Array, levels: int) -> tuple[Array, Array]:
    """Returns minimum and scale of each group: `(*groups, size) -> (*groups)`, twice.

    They have the dtype of `values`, and are exact in bfloat16.
    """
    smallest, largest = values.min(axis=-1), values.max(axis=-1)
    minimum = _round_to_bfloat16(smallest - _MARGIN * jnp.abs(smallest))
    scale = _round_to_bfloat16((largest - minimum) * ((1 + _MARGIN) / levels))
    return minimum, jnp.maximum(scale, _MIN_SCALE)


def _round_to_bfloat16(x: Array) -> Array:
    # XLA may remove a cast to bfloat16 and back.
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
