"""`flax.linen` normalisations that cache their normalised input in 8 bits.

Each is a thin subclass of Flax's layer of the same name. Flax's own code computes the
output and the running statistics, bit for bit; the gradient is that of
`dropit_jax.nn.norms`, and as near as is said there.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from flax.linen import normalization
from jaxtyping import Array, Float

from dropit_jax import compat, norm_layers
from dropit_jax.linen import parameters
from dropit_jax.nn import norm_gradient
from dropit_jax.nn.norm_gradient import Norm

LAYERS: tuple[type[nn.Module], ...] = (
    nn.BatchNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.InstanceNorm,
)


class BatchNorm(nn.BatchNorm):
    """`flax.linen.BatchNorm` that caches 8.5 bits an element."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "..."],
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
    ) -> Float[Array, "..."]:
        """Normalises by the statistics of the batch, or by running averages."""
        call = compat.without_flax_wrapper(super().__call__)
        return compact(self, call, x, use_running_average, mask=mask)


class LayerNorm(nn.LayerNorm):
    """`flax.linen.LayerNorm` that caches 8.5 bits an element."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "..."], *, mask: Array | None = None
    ) -> Float[Array, "..."]:
        """Normalises over `reduction_axes`."""
        return compact(
            self, compat.without_flax_wrapper(super().__call__), x, mask=mask
        )


class RMSNorm(nn.RMSNorm):
    """`flax.linen.RMSNorm` that caches 8.5 bits an element."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "..."], *, mask: Array | None = None
    ) -> Float[Array, "..."]:
        """Divides by the root mean square over `reduction_axes`."""
        return compact(
            self, compat.without_flax_wrapper(super().__call__), x, mask=mask
        )


class GroupNorm(nn.GroupNorm):
    """`flax.linen.GroupNorm` that caches 8.5 bits an element."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "..."], *, mask: Array | None = None
    ) -> Float[Array, "..."]:
        """Normalises each sample's groups of channels."""
        return compact(
            self, compat.without_flax_wrapper(super().__call__), x, mask=mask
        )


class InstanceNorm(nn.InstanceNorm):
    """`flax.linen.InstanceNorm` that caches 8.5 bits an element."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "..."], *, mask: Array | None = None
    ) -> Float[Array, "..."]:
        """Normalises each sample's channels."""
        return compact(
            self, compat.without_flax_wrapper(super().__call__), x, mask=mask
        )


def compact(
    module: nn.Module,
    method: Callable[..., Array],
    x: Any,
    use_running_average: bool | None = None,
    *,
    mask: Array | None = None,
) -> Array:
    """`method(x, ...)`, with a compact residual.

    Args:
      module: one of `LAYERS`, bound.
      method: the `__call__` of Flax's layer for it.
      x: what is normalised.
      use_running_average: of the call of a `BatchNorm`.
      mask: of the call.
    """
    arguments: dict[str, Any] = {"mask": mask}
    if isinstance(module, nn.BatchNorm):
        arguments["use_running_average"] = use_running_average
    x = jnp.asarray(x)
    if module.is_initializing() or not jnp.issubdtype(x.dtype, jnp.floating):
        return method(x, **arguments)
    by_shape = parameters.read_by_shape(module)
    with norm_layers.statistics_noted(normalization) as noted, by_shape:
        y = method(jax.lax.stop_gradient(x), **arguments)
    constant = _uses_running_average(module, use_running_average)
    norm = norm_layers.describe(module, x, LAYERS, constant)
    if constant:
        mean, var, mask = *_running_statistics(module, x, norm), None
    elif noted:
        mean, var = (
            norm_gradient.with_axes(statistic, x, norm) for statistic in noted[0]
        )
    else:
        mean, var = norm_gradient.statistics(
            x,
            norm,
            use_fast_variance=module.use_fast_variance,
            mask=mask,
            dtype=_statistics_dtype(module, x),
        )
    mask = None if mask is None else jnp.asarray(mask, bool)
    scale, bias = (_parameter(module, name) for name in ("scale", "bias"))
    return norm_gradient.with_compact_gradient(y, x, mean, var, scale, bias, norm, mask)


def _uses_running_average(module: Any, given: bool | None) -> bool:
    if not isinstance(module, nn.BatchNorm):
        return False
    own = module.use_running_average
    return bool(nn.merge_param("use_running_average", own, given))


def _statistics_dtype(module: Any, x: Array) -> Any:
    dtype = x.dtype if module.dtype is None else module.dtype
    if module.force_float32_reductions:
        dtype = jnp.promote_types(dtype, jnp.float32)
    return dtype


def _running_statistics(module: Any, x: Array, norm: Norm) -> tuple[Array, Array]:
    shape = [size if a in norm.feature_axes else 1 for a, size in enumerate(x.shape)]
    mean, var = (
        meta.unbox(module.get_variable("batch_stats", name)).reshape(shape)
        for name in ("mean", "var")
    )
    return mean, var


def _parameter(module: nn.Module, name: str) -> Array | None:
    if not module.has_variable("params", name):
        return None
    return meta.unbox(module.get_variable("params", name))
