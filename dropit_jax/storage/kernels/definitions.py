"""The kernels' results in plain JAX: the definition that they are tested against.

Values are copied by their bits, and cast only to `Plan.value_dtype` and back.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped, UInt8, UInt16

from dropit_jax.storage import packing
from dropit_jax.storage.kernels.plan import Plan, cast_bits, from_bits, to_bits
from dropit_jax.storage.selection import elements, small_chunks
from dropit_jax.storage.shapes import Shape

# Packed bytes, or indices.
Positions = UInt8[Array, "*rows units stored"] | UInt16[Array, "*rows units stored"]


def compress(
    x: Float[Array, "*rows units elements"],
    plan: Plan,
    before: UInt8[Array, "*rows units"] | None = None,
) -> tuple[Float[Array, "*rows units kept"], Positions]:
    """Keeps the largest magnitudes of each chunk.

    Args:
      x: `elements` is `plan.unit * plan.size`: whole chunks.
      plan: how they are stored.
      before: of `before_first`, or `None`.

    Returns:
      The kept values, (*rows, units, plan.unit * plan.kept), and their positions,
      (*rows, units, plan.positions).
    """
    lead = x.shape[:-1]
    if _is_large_bitmap(plan):
        values, positions = _select_large(x, plan)
    else:
        chunks = _in_chunks(x, plan.unit, plan.size)
        values, positions = _select(chunks, lead, plan, before)
    if values.dtype != plan.value_dtype:
        values = values.astype(plan.value_dtype)
    return values.reshape(*lead, plan.unit * plan.kept), positions


def before_first(
    units: Sequence[int], plan: Plan
) -> UInt8[Array, "*rows units"] | None:
    """The argument `before` of `compress`; `None` where it takes none.

    It is for the chunks of the default. Those of fewer elements it takes longer.
    """
    if not _in_halves(plan) or (plan.size, plan.kept) != (16, 2):
        return None
    return lax.full(units, small_chunks.BEFORE_FIRST, jnp.uint8)


# Traced once, whatever it is to wait for.
@functools.partial(
    jax.jit, static_argnames=("plan", "dtype", "by_reduction"), inline=True
)
def decompress(
    values: Float[Array, "*rows units kept"],
    positions: Positions,
    plan: Plan,
    dtype: jax.typing.DTypeLike,
    by_reduction: bool = False,
) -> Float[Array, "*rows units elements"]:
    """Puts kept values back in their places, and zero elsewhere.

    Args:
      values: as `compress` returns them.
      positions: as `compress` returns them.
      plan: what they were made by.
      dtype: the result's.
      by_reduction: as `small_chunks.place_by_reduction` does, where chunks are small
        and their positions are indices. There is no gradient then.
    """
    if jnp.dtype(dtype).itemsize == 4:
        # Of 16 bits XLA's CPU compiler loses what is in a NaN.
        return placed(values.astype(dtype), positions, plan, by_reduction)
    kept = cast_bits(to_bits(values), values.dtype, dtype)
    return from_bits(placed(kept, positions, plan, by_reduction), dtype)


def placed(
    kept: Shaped[Array, "*rows units kept"],
    positions: Positions,
    plan: Plan,
    by_reduction: bool = False,
) -> Shaped[Array, "*rows units elements"]:
    """Kept elements of any type in their places, and zero elsewhere.

    The arguments are those of `decompress`.
    """
    if _is_large_bitmap(plan):
        return elements.from_bitmap(kept, positions, ((plan.unit, plan.size),))
    lead = kept.shape[:-1]
    kept = _in_chunks(kept, plan.unit, plan.kept)
    if plan.encoding == "bitmap":
        mask = packing.unpack(positions, 1, plan.unit * plan.size).astype(bool)
        whole = elements.expand(kept, _in_chunks(mask, plan.unit, plan.size))
    else:
        whole = _at_indices(kept, positions, plan, by_reduction)
    return whole.reshape(*lead, plan.unit * plan.size)


def _at_indices(
    kept: Shaped[Array, "*chunks kept"],
    positions: Positions,
    plan: Plan,
    by_reduction: bool,
) -> Shaped[Array, "*chunks size"]:
    """Chunks with kept elements where their stored indices say."""
    halves = _in_halves(plan)
    if plan.packed and not halves:  # a byte has indices of two chunks
        positions = packing.unpack(positions, 4, plan.unit * plan.kept)
    if not halves:
        positions = positions.reshape(kept.shape)
    if by_reduction and plan.size <= elements.MAX_SMALL:
        return small_chunks.place_by_reduction(kept, positions, plan.size, halves)
    if halves:
        return small_chunks.place_at_halves(kept, positions, plan.size)
    return elements.place(kept, positions, plan.size)


def _in_chunks(x: Array, unit: int, size: int) -> Array:
    """(..., unit · size) as (..., unit, size); of one chunk, as it is."""
    return x if unit == 1 else x.reshape(*x.shape[:-1], unit, size)


def _in_halves(plan: Plan) -> bool:
    """Whether a byte has two indices, both of one chunk."""
    return plan.ordered and plan.packed and plan.unit == 1


def _is_large_bitmap(plan: Plan) -> bool:
    """Whether all chunks of a unit are compacted as one."""
    return plan.encoding == "bitmap" and plan.size > elements.MAX_SMALL


def _select_large(
    x: Float[Array, "*rows units elements"], plan: Plan
) -> tuple[Float[Array, "*rows units kept"], Positions]:
    """`_select` where `_is_large_bitmap`, of whole units."""
    segments = ((plan.unit, plan.size),)
    magnitudes = elements.magnitude(x)
    bits, bitmap = elements.top_k_bitmap(to_bits(x), segments, (plan.kept,), magnitudes)
    return from_bits(bits, x.dtype), bitmap


def _select(
    chunks: Float[Array, "*chunks size"],
    lead: Shape,
    plan: Plan,
    before: UInt8[Array, "*chunks"] | None,
) -> tuple[Shaped[Array, "*chunks kept"], Positions]:
    """The kept elements of chunks, and their stored positions."""
    k = plan.kept
    if plan.ordered:
        halves = _in_halves(plan)
        if before is not None:
            values, indices = small_chunks.top_2_of_magnitudes(chunks, before)
        else:
            values, apart = small_chunks.top_k_of_magnitudes(chunks, k, halves)
            indices = small_chunks.stack(apart)
        if plan.packed and not halves:
            indices = indices.reshape(*lead, plan.unit * k)
            return values, packing.pack(indices, plan.index_bits)
    else:
        mask = elements.top_k_mask(chunks, k)
        values = from_bits(elements.compact(to_bits(chunks), mask, k), chunks.dtype)
        if plan.encoding == "bitmap":
            mask = mask.reshape(*lead, plan.unit * plan.size)
            return values, packing.pack(mask, 1)
        slots = jnp.broadcast_to(jnp.arange(plan.size), chunks.shape)
        indices = elements.compact(slots, mask, k)
    return values, indices.reshape(*lead, plan.positions).astype(plan.position_dtype)
