"""Which elements of a chunk stay: exact top-k by magnitude along the last axis.

Every method gives what `lax.top_k(abs(x), k)` gives: largest magnitude first, ties to
the lower index, NaN above infinity. They differ in how XLA compiles them.

Chunks of at most `MAX_FUSED` elements are never sorted, gathered from or scattered
into: they use comparisons and one-hot sums alone, which fuse into a few loops, need
no temporaries of the size of a sort's, and stay where the data is on a sharded mesh.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Integer, Shaped

from dropit_jax.policy import Selection

# The largest chunk that selects by fused comparisons. Beyond, they cost more than
# `lax.top_k` does.
MAX_FUSED = 64

# Up to so many kept elements a chunk, taking the maximum that many times is faster and
# needs less memory than ranking every element against every other.
_MAX_PASSES = 4


def top_k(
    x: Float[Array, "*rows size"], k: int, selection: Selection = "auto"
) -> tuple[Float[Array, "*rows {k}"], Int[Array, "*rows {k}"]]:
    """The k elements of largest magnitude along the last axis, largest first.

    Args:
      x: chunks.
      k: how many elements of each chunk to take.
      selection: `"top_k"` forces `lax.top_k`; `"auto"` takes the fastest method.

    Returns:
      The elements (with their sign) and their indices.
    """
    if selection == "top_k" or x.shape[-1] > MAX_FUSED:
        indices = lax.top_k(jnp.abs(x), k)[1]
        return jnp.take_along_axis(x, indices, axis=-1), indices
    indices = _largest_first(_magnitude(x), k)
    return _take(x, indices[..., :, None] == jnp.arange(x.shape[-1])), indices


def top_k_mask(
    x: Float[Array, "*rows size"], k: int, selection: Selection = "auto"
) -> Bool[Array, "*rows size"]:
    """Where the k elements of largest magnitude are, along the last axis.

    The arguments and the elements chosen are those of `top_k`.
    """
    if selection == "top_k" or x.shape[-1] > MAX_FUSED:
        indices = lax.top_k(jnp.abs(x), k)[1]
        nothing = jnp.zeros_like(x, dtype=bool)
        return jnp.put_along_axis(nothing, indices, True, axis=-1, inplace=False)
    if k > _MAX_PASSES:
        return _ranks(_magnitude(x)) < k
    indices = _largest_first(_magnitude(x), k)
    return (indices[..., :, None] == jnp.arange(x.shape[-1])).any(axis=-2)


def place(
    values: Shaped[Array, "*rows k"], indices: Integer[Array, "*rows k"], size: int
) -> Shaped[Array, "*rows {size}"]:
    """Puts values back where they came from, and zero elsewhere.

    Args:
      values: kept elements of each chunk.
      indices: their indices in the chunk, without repetition.
      size: elements of the chunk.
    """
    if size > MAX_FUSED:
        zeros = jnp.zeros((*values.shape[:-1], size), values.dtype)
        return jnp.put_along_axis(
            zeros, indices.astype(jnp.int32), values, axis=-1, inplace=False
        )
    slots = jnp.arange(size, dtype=indices.dtype)
    # A chain of selections, not a sum: it fuses with whatever reads the result.
    placed = jnp.zeros((*values.shape[:-1], size), values.dtype)
    for i in range(values.shape[-1]):
        here = indices[..., i : i + 1] == slots
        placed = jnp.where(here, values[..., i : i + 1], placed)
    return placed


def compact(
    x: Shaped[Array, "*rows size"], mask: Bool[Array, "*rows size"], k: int
) -> Shaped[Array, "*rows {k}"]:
    """The k elements under the mask, in the order of their indices."""
    slots = _slots(mask)
    if x.shape[-1] <= MAX_FUSED:
        return _take(x, _one_hot(slots, mask, k))
    zeros = jnp.zeros((*x.shape[:-1], k + 1), x.dtype)
    target = jnp.where(mask, slots, k)  # the dropped share one slot, then cut off
    return jnp.put_along_axis(zeros, target, x, axis=-1, inplace=False)[..., :k]


def expand(
    values: Shaped[Array, "*rows k"], mask: Bool[Array, "*rows size"]
) -> Shaped[Array, "*rows size"]:
    """The inverse of `compact`: values under the mask, zero elsewhere."""
    slots, k = _slots(mask), values.shape[-1]
    if mask.shape[-1] <= MAX_FUSED:
        bits = _bits(values)
        spread = jnp.where(_one_hot(slots, mask, k), bits[..., :, None], 0)
        return _from_bits(spread.max(axis=-2), values.dtype)
    taken = jnp.take_along_axis(values, jnp.clip(slots, 0, k - 1), axis=-1)
    return jnp.where(mask, taken, 0)


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def _from_bits(bits: Array, dtype: jax.typing.DTypeLike) -> Array:
    return lax.bitcast_convert_type(bits, dtype)


def _magnitude(x: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    """|x| as an integer of the same order.

    The bits of a non-negative float order like the float, with NaN above infinity,
    and unlike floats they compare exactly where denormal numbers are flushed to zero.
    """
    signed = lax.bitcast_convert_type(x, jnp.dtype(f"int{8 * x.dtype.itemsize}"))
    return signed & jnp.iinfo(signed.dtype).max


def _largest_first(magnitude: Int[Array, "*rows size"], k: int) -> Array:
    """Indices of the k largest, largest first, ties to the lower index."""
    size = magnitude.shape[-1]
    slots = jnp.arange(size)
    if k > _MAX_PASSES:
        ranks = _ranks(magnitude)
        order = ranks[..., None, :] == jnp.arange(k)[:, None]
        return jnp.where(order, slots, 0).max(axis=-1)
    passes = []
    for _ in range(k):
        largest = lax.argmax(magnitude, magnitude.ndim - 1, jnp.int32)
        passes.append(largest)
        magnitude = jnp.where(largest[..., None] == slots, -1, magnitude)
    return jnp.stack(passes, axis=-1)


def _ranks(magnitude: Int[Array, "*rows size"]) -> Int[Array, "*rows size"]:
    """How many elements of the chunk come before each: larger, or equal and earlier."""
    slots = jnp.arange(magnitude.shape[-1])
    this, other = magnitude[..., :, None], magnitude[..., None, :]
    earlier = slots[None, :] < slots[:, None]
    before = (other > this) | ((other == this) & earlier)
    return before.sum(axis=-1, dtype=jnp.int32)


def _slots(mask: Bool[Array, "*rows size"]) -> Int[Array, "*rows size"]:
    """The place of each masked element among the masked elements of its chunk."""
    return jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1


def _one_hot(slots: Array, mask: Array, k: int) -> Bool[Array, "*rows k size"]:
    return (slots[..., None, :] == jnp.arange(k)[:, None]) & mask[..., None, :]


def _take(x: Array, one_hot: Bool[Array, "*rows k size"]) -> Shaped[Array, "*rows k"]:
    """The element under each one-hot row, by its bits: exact for -0.0 and NaN."""
    taken = jnp.where(one_hot, _bits(x)[..., None, :], 0).max(axis=-1)
    return _from_bits(taken, x.dtype)
