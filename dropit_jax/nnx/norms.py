"""`flax.nnx` normalisations that cache their normalised input in 8 bits.

Each is a thin subclass of Flax's layer of the same name. Flax's own code computes the
output and the running statistics, bit for bit; the gradient is that of
`dropit_jax.nn.norms`, and as near as is said there.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import normalization
from jaxtyping import Array, Float

from dropit_jax import norm_layers
from dropit_jax.nn import norm_gradient
from dropit_jax.nn.norm_gradient import Norm

_FLAX = (
    nnx.BatchNorm,
    nnx.LayerNorm,
    nnx.RMSNorm,
    nnx.GroupNorm,
    nnx.InstanceNorm,
)


class _Compact(nnx.Module):
    """What the layers here do with Flax's code."""

    def __call__(
        self, x: Float[Array, "..."], *args: Any, **kwargs: Any
    ) -> Float[Array, "..."]:
        """The call of Flax's layer."""
        method: Any = super().__call__
        return _compact(self, method, x, *args, **kwargs)


class BatchNorm(_Compact, nnx.BatchNorm):
    """`flax.nnx.BatchNorm` that caches 8.5 bits an element."""


class LayerNorm(_Compact, nnx.LayerNorm):
    """`flax.nnx.LayerNorm` that caches 8.5 bits an element."""


class RMSNorm(_Compact, nnx.RMSNorm):
    """`flax.nnx.RMSNorm` that caches 8.5 bits an element."""


class GroupNorm(_Compact, nnx.GroupNorm):
    """`flax.nnx.GroupNorm` that caches 8.5 bits an element.

    It is Flax's layer where `reduction_axes` are not all axes but the first: what Flax
    computes then is not group normalisation (it spreads the statistics of the groups
    along axis 1, whatever that is).
    """


class InstanceNorm(_Compact, nnx.InstanceNorm):
    """`flax.nnx.InstanceNorm` that caches 8.5 bits an element."""


LAYERS: tuple[type[nnx.Module], ...] = (
    BatchNorm,
    LayerNorm,
    RMSNorm,
    GroupNorm,
    InstanceNorm,
)


def _compact(
    layer: Any, method: Callable[..., Array], x: Any, *args: Any, **kwargs: Any
) -> Array:
    """`method(x, ...)`, the call of Flax's layer, with a compact residual."""
    given = inspect.signature(method).bind(x, *args, **kwargs).arguments
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating) or _is_scrambled(layer, x):
        return method(x, *args, **kwargs)
    with norm_layers.statistics_noted(normalization) as noted:
        y = method(jax.lax.stop_gradient(x), *args, **kwargs)
    mask = given.get("mask")
    constant = _uses_running_average(layer, given.get("use_running_average"))
    norm = norm_layers.describe(layer, x, _FLAX, constant)
    x, mean, var, scale, bias = _promoted(layer, x, norm)
    if constant:
        mask = None
    elif noted:
        mean, var = (
            norm_gradient.with_axes(statistic, x, norm) for statistic in noted[0]
        )
    else:
        dtype = x.dtype if layer.dtype is None else layer.dtype
        mean, var = norm_gradient.statistics(
            x,
            norm,
            use_fast_variance=layer.use_fast_variance,
            mask=mask,
            dtype=jnp.promote_types(dtype, jnp.float32),
        )
    mask = None if mask is None else jnp.asarray(mask, bool)
    return norm_gradient.with_compact_gradient(y, x, mean, var, scale, bias, norm, mask)


def _is_scrambled(layer: Any, x: Array) -> bool:
    """Whether Flax mixes up the statistics of groups."""
    if not isinstance(layer, nnx.GroupNorm) or layer.reduction_axes is None:
        return False
    axes = norm_layers.describe(layer, x, _FLAX, constant=False).axes
    return axes != tuple(range(1, x.ndim))


def _uses_running_average(layer: Any, given: bool | None) -> bool:
    if not isinstance(layer, nnx.BatchNorm):
        return False
    return bool(layer.use_running_average if given is None else given)


def _promoted(
    layer: Any, x: Array, norm: Norm
) -> tuple[Array, Any, Any, Array | None, Array | None]:
    """Input, running averages, scale and bias, as Flax has them promoted.

    All but the input have an axis for each of the input's, or for each of the features,
    as `norm_gradient.with_compact_gradient` takes them.
    """
    sizes = [x.shape[axis] for axis in norm.feature_axes]
    shape = [n if axis in norm.feature_axes else 1 for axis, n in enumerate(x.shape)]
    scale, bias = (
        None if variable is None else variable[...].reshape(sizes)
        for variable in (layer.scale, getattr(layer, "bias", None))
    )
    mean = var = None
    # As many arrays as Flax says that the function takes.
    if isinstance(layer, nnx.BatchNorm):
        arrays = (x, layer.mean[...], layer.var[...], scale, bias)
        x, mean, var, scale, bias = layer.promote_dtype(arrays, dtype=layer.dtype)
        mean, var = (jax.lax.stop_gradient(a).reshape(shape) for a in (mean, var))
    elif isinstance(layer, nnx.RMSNorm):
        x, scale = layer.promote_dtype((x, scale), dtype=layer.dtype)
    else:
        x, scale, bias = layer.promote_dtype((x, scale, bias), dtype=layer.dtype)
    return x, mean, var, scale, bias
