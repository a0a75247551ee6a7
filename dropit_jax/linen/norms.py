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
from jaxtyping import Array, Float

from dropit_jax.nn import norms
from dropit_jax.nn.norms import Across, Norm

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
        call = super().__call__
        return compact(self, call, x, use_running_average, mask=mask)


class LayerNorm(nn.LayerNorm):
    """`flax.linen.LayerNorm` that caches 8.5 bits an element."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "..."], *, mask: Array | None = None
    ) -> Float[Array, "..."]:
        """Normalises over `reduction_axes`."""
        return compact(self, super().__call__, x, mask=mask)


class RMSNorm(nn.RMSNorm):
    """`flax.linen.RMSNorm` that caches 8.5 bits an element."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "..."], *, mask: Array | None = None
    ) -> Float[Array, "..."]:
        """Divides by the root mean square over `reduction_axes`."""
        return compact(self, super().__call__, x, mask=mask)


class GroupNorm(nn.GroupNorm):
    """`flax.linen.GroupNorm` that caches 8.5 bits an element."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "..."], *, mask: Array | None = None
    ) -> Float[Array, "..."]:
        """Normalises each sample's groups of channels."""
        return compact(self, super().__call__, x, mask=mask)


class InstanceNorm(nn.InstanceNorm):
    """`flax.linen.InstanceNorm` that caches 8.5 bits an element."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "..."], *, mask: Array | None = None
    ) -> Float[Array, "..."]:
        """Normalises each sample's channels."""
        return compact(self, super().__call__, x, mask=mask)


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
    norm = _norm(module, x, use_running_average)
    if norm.constant:
        mean, var = _running_statistics(module, x, norm)
    else:
        mean, var = norms.statistics(
            x,
            norm,
            use_fast_variance=module.use_fast_variance,
            mask=mask,
            dtype=_statistics_dtype(module, x),
        )
        mask = None if mask is None else jnp.asarray(mask, bool)
    y = method(jax.lax.stop_gradient(x), **arguments)
    scale, bias = (_parameter(module, name) for name in ("scale", "bias"))
    mask = None if norm.constant else mask
    return norms.with_compact_gradient(y, x, mean, var, scale, bias, norm, mask)


def _norm(module: Any, x: Array, use_running_average: bool | None) -> Norm:
    across = Across(module.axis_name, _hashable(module.axis_index_groups))
    rest = {"epsilon": module.epsilon, "across": across}
    if isinstance(module, nn.BatchNorm):
        constant = nn.merge_param(
            "use_running_average", module.use_running_average, use_running_average
        )
        features = _axes(module.axis, x)
        axes = tuple(axis for axis in range(x.ndim) if axis not in features)
        return Norm(axes, feature_axes=features, constant=bool(constant), **rest)
    if isinstance(module, nn.InstanceNorm):
        features = _axes(module.feature_axes, x)
        axes = tuple(axis for axis in range(1, x.ndim) if axis not in features)
        return Norm(axes, feature_axes=features, **rest)
    if isinstance(module, nn.GroupNorm):
        given = module.reduction_axes
        axes = _axes((*range(1, x.ndim - 1), -1) if given is None else given, x)
        return Norm(axes, groups=_groups(module, x), **rest)
    axes, features = _axes(module.reduction_axes, x), _axes(module.feature_axes, x)
    use_mean = not isinstance(module, nn.RMSNorm)
    return Norm(axes, feature_axes=features, use_mean=use_mean, **rest)


def _groups(module: Any, x: Array) -> int:
    if module.group_size is None:
        return module.num_groups
    return x.shape[-1] // module.group_size


def _axes(axes: Any, x: Array) -> tuple[int, ...]:
    listed = (axes,) if isinstance(axes, int) else axes
    return tuple(sorted({axis % x.ndim for axis in listed}))


def _hashable(groups: Any) -> tuple[tuple[int, ...], ...] | None:
    return None if groups is None else tuple(tuple(group) for group in groups)


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
