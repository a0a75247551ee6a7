"""Normalisations that cache their normalised input in 8 bits.

With the mean μ and variance σ² over some axes, N elements each, and a cotangent g,

    x̂ = (x - μ) / √(σ² + ε)        y = γ x̂ + β
    ∇x = (h - mean(h) - x̂ · mean(h x̂)) / √(σ² + ε),    h = γ g
    ∇γ = Σ g x̂                      ∇β = Σ g

so that of x the backward pass needs x̂ alone, and that only inside of means and as a
factor of one: it is cached in 8.5 bits an element (`dropit_jax.nn.eight_bits`).
Autodiff keeps x itself, and x - μ, in the type of the computation.

Bounds. With the largest δ that `dropit_jax.nn.eight_bits` gives for an x̂,

    |error of ∇γ| ≤ δ Σ |g|
    |error of ∇x| ≤ δ (|mean(h x̂)| + (|x̂| + δ) · mean|h|) / √(σ² + ε)

and ∇β is exact.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dropit_jax.nn.norm_gradient import (
    Across,
    Norm,
    along,
    spread,
    statistics,
    with_compact_gradient,
)


def layer_norm(
    x: Float[Array, "*batch features"],
    scale: Float[Array, " features"] | None = None,
    bias: Float[Array, " features"] | None = None,
    *,
    epsilon: float = 1e-6,
) -> Float[Array, "*batch features"]:
    """Layer normalisation over the last axis (Ba et al., 2016), as Flax's.

    Args:
      x: any real floating dtype; statistics are float32 at least.
      scale: γ; `None`: 1.
      bias: β; `None`: 0.
      epsilon: added to the variance.
    """
    return _normalized(x, scale, bias, Norm((x.ndim - 1,), epsilon))


def rms_norm(
    x: Float[Array, "*batch features"],
    scale: Float[Array, " features"] | None = None,
    *,
    epsilon: float = 1e-6,
) -> Float[Array, "*batch features"]:
    """Normalisation by the root mean square over the last axis, as Flax's.

    (Zhang and Sennrich, 2019.) It is layer normalisation with μ = 0.

    Args:
      x: any real floating dtype; statistics are float32 at least.
      scale: γ; `None`: 1.
      epsilon: added to the mean square.
    """
    norm = Norm((x.ndim - 1,), epsilon, use_mean=False)
    return _normalized(x, scale, None, norm)


def group_norm(
    x: Float[Array, "batch *positions channels"],
    num_groups: int,
    scale: Float[Array, " channels"] | None = None,
    bias: Float[Array, " channels"] | None = None,
    *,
    epsilon: float = 1e-6,
) -> Float[Array, "batch *positions channels"]:
    """Normalisation of each sample's groups of channels (Wu and He, 2018), as Flax's.

    Args:
      x: any real floating dtype; statistics are float32 at least.
      num_groups: how many groups the channels are cut into.
      scale: γ; `None`: 1.
      bias: β; `None`: 0.
      epsilon: added to the variance.

    Raises:
      ValueError: the groups do not divide the channels.
    """
    channels = x.shape[-1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(
            f"group_norm: {num_groups} groups do not divide {channels} channels."
        )
    norm = Norm((*range(1, x.ndim - 1), x.ndim - 1), epsilon, groups=num_groups)
    return _normalized(x, scale, bias, norm)


def batch_norm(
    x: Float[Array, "*batch channels"],
    scale: Float[Array, " channels"] | None = None,
    bias: Float[Array, " channels"] | None = None,
    *,
    epsilon: float = 1e-5,
    axis_name: Any = None,
) -> tuple[
    Float[Array, "*batch channels"],
    Float[Array, " channels"],
    Float[Array, " channels"],
]:
    """Batch normalisation by the batch's own statistics (Ioffe and Szegedy, 2015).

    Args:
      x: any real floating dtype; statistics are float32 at least.
      scale: γ; `None`: 1.
      bias: β; `None`: 0.
      epsilon: added to the variance.
      axis_name: of the devices that share a batch, under `jax.pmap` or
        `jax.shard_map`.

    Returns:
      What is normalised, and the mean and variance, which have no gradient, for
      running averages.
    """
    x = jnp.asarray(x)
    norm = Norm(tuple(range(x.ndim - 1)), epsilon, across=Across(axis_name))
    mean, var = statistics(x, norm)
    y = _affine(x, mean, var, scale, bias, norm)
    y = with_compact_gradient(y, x, mean, var, scale, bias, norm)
    return y, mean.reshape(-1), var.reshape(-1)


def _normalized(x: Array, scale: Array | None, bias: Array | None, norm: Norm) -> Array:
    x = jnp.asarray(x)
    mean, var = statistics(x, norm)
    y = _affine(x, mean, var, scale, bias, norm)
    return with_compact_gradient(y, x, mean, var, scale, bias, norm)


def _affine(
    x: Array,
    mean: Array,
    var: Array,
    scale: Array | None,
    bias: Array | None,
    norm: Norm,
) -> Array:
    """Operation for operation what Flax computes."""
    dtype = jnp.result_type(*(array for array in (x, scale, bias) if array is not None))
    factor = lax.rsqrt(spread(var, x, norm) + norm.epsilon)
    if scale is not None:
        factor = factor * along(scale, x, norm)
    y = (x - spread(mean, x, norm)) * factor
    if bias is not None:
        y = y + along(bias, x, norm)
    return y.astype(dtype)
