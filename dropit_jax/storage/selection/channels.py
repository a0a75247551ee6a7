"""Selects whole channels, which are slices along the last axis (paper §3.3)."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Integer, Shaped

from dropit_jax.storage import dtypes


def largest(x: Float[Array, "*batch channels"], k: int) -> Int[Array, "{k}"]:
    """Returns the k channels of largest L2 norm, in the order of their indices.

    Ties go to the lower index; a channel with NaN or infinity counts as largest.
    Squares are summed in float32 at least: channels whose sums overflow are tied, and
    so are channels whose squares underflow to 0.
    """
    wide = x.astype(dtypes.wide(x.dtype))
    energy = jnp.sum(jnp.square(wide), axis=tuple(range(x.ndim - 1)))
    # `lax.top_k` ranks a NaN with a sign, such as 0 / 0 on x86, lowest.
    energy = jnp.where(jnp.isnan(energy), jnp.nan, energy)
    return jnp.sort(lax.top_k(energy, k)[1])


def random(key: Array, count: int, k: int) -> Int[Array, "{k}"]:
    """Returns a uniform sample of k of `count` channels, in ascending order."""
    return jnp.sort(jax.random.choice(key, count, (k,), replace=False))


def take(
    x: Shaped[Array, "*batch channels"], indices: Integer[Array, "k"]
) -> Shaped[Array, "*batch k"]:
    """Returns the channels at these indices: `(*batch, channels) -> (*batch, k)`.

    Indices are not checked: they must be ascending and below the number of channels.
    """
    if indices.size == 1:  # a slice is cheaper than a gather
        return lax.dynamic_slice_in_dim(x, indices[0], 1, axis=-1)
    return x.at[..., indices].get(mode="promise_in_bounds", indices_are_sorted=True)


def place(
    values: Shaped[Array, "*batch k"], indices: Integer[Array, "k"], count: int
) -> Shaped[Array, "*batch {count}"]:
    """Returns an array with channels at their indices and zero in all others.

    `(*batch, k) -> (*batch, count)`. Indices are not checked: they must be distinct,
    ascending and below `count`.
    """
    kept = jnp.zeros(count, bool).at[indices].set(True, unique_indices=True)
    if indices.size == 1:
        return jnp.where(kept, values, 0)
    # A gather: a scatter would write the channels one after the other.
    source = jnp.clip(jnp.cumsum(kept) - 1, 0)
    return jnp.where(kept, take(values, source), 0)
