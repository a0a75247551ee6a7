"""`flax.linen` normalisations that cache their normalised input in 8 bits.

Each is a thin subclass of Flax's layer of the same name. Flax's own code computes the
output and the running statistics, bit for bit; the gradient is that of
`dropit_jax.nn.norms`, and as near as is said there.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from flax.linen import normalization
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
    with statistics_noted(normalization) as noted:
        y = method(jax.lax.stop_gradient(x), **arguments)
    constant = _uses_running_average(module, use_running_average)
    norm = describe(module, x, LAYERS, constant)
    if constant:
        mean, var, mask = *_running_statistics(module, x, norm), None
    elif noted:
        mean, var = (norms.with_axes(statistic, x, norm) for statistic in noted[0])
    else:
        mean, var = norms.statistics(
            x,
            norm,
            use_fast_variance=module.use_fast_variance,
            mask=mask,
            dtype=_statistics_dtype(module, x),
        )
    mask = None if mask is None else jnp.asarray(mask, bool)
    scale, bias = (_parameter(module, name) for name in ("scale", "bias"))
    return norms.with_compact_gradient(y, x, mean, var, scale, bias, norm, mask)


def describe(layer: Any, x: Array, kinds: Sequence[type], constant: bool) -> Norm:
    """What a layer does.

    Args:
      layer: of `flax.linen` or `flax.nnx`, whose attributes have the same names.
      x: what it normalises.
      kinds: the classes that its own is one of, in the order of `LAYERS`.
      constant: whether it uses running averages.
    """
    batch, _, rms, group, instance = (isinstance(layer, kind) for kind in kinds)
    rest = {
        "epsilon": layer.epsilon,
        "across": Across(layer.axis_name, _hashable(layer.axis_index_groups)),
    }
    if group:
        given = layer.reduction_axes
        axes = _axes((*range(1, x.ndim - 1), -1) if given is None else given, x)
        return Norm(axes, groups=_groups(layer, x), **rest)
    features = _axes(layer.axis if batch else layer.feature_axes, x)
    if batch or instance:
        first = 0 if batch else 1
        axes = tuple(axis for axis in range(first, x.ndim) if axis not in features)
        return Norm(axes, feature_axes=features, constant=constant, **rest)
    axes = _axes(layer.reduction_axes, x)
    return Norm(axes, feature_axes=features, use_mean=not rms, **rest)


def statistics_noted(
    flax: Any,
) -> contextlib.AbstractContextManager[list[tuple[Array, Array]]]:
    """Takes note of the statistics that Flax's layers compute in the context.

    Computed a second time they would be the same numbers, but on a mesh of devices XLA
    would also move them a second time. Flax has no public hook for this. Outside of the
    context its private one does what it did; where a version has none, nothing is
    noted.

    Args:
      flax: its module of normalisations.
    """
    _let_note(flax)
    return _noting()


# Where statistics are noted.
_noted: contextvars.ContextVar[list[tuple[Array, Array]] | None]
_noted = contextvars.ContextVar("noted", default=None)


@contextlib.contextmanager
def _noting() -> Iterator[list[tuple[Array, Array]]]:
    noted: list[tuple[Array, Array]] = []
    token = _noted.set(noted)
    try:
        yield noted
    finally:
        _noted.reset(token)


@functools.cache
def _let_note(flax: Any) -> None:
    compute = getattr(flax, "_compute_stats", None)
    if compute is None:
        return

    @functools.wraps(compute)
    def compute_and_note(*args: Any, **kwargs: Any) -> tuple[Array, Array]:
        statistics: tuple[Array, Array] = compute(*args, **kwargs)
        if (noted := _noted.get()) is not None:
            noted.append(statistics)
        return statistics

    flax._compute_stats = compute_and_note


def _uses_running_average(module: Any, given: bool | None) -> bool:
    if not isinstance(module, nn.BatchNorm):
        return False
    own = module.use_running_average
    return bool(nn.merge_param("use_running_average", own, given))


def _groups(layer: Any, x: Array) -> int:
    if layer.group_size is None:
        return layer.num_groups
    return x.shape[-1] // layer.group_size


def _axes(axes: Any, x: Array) -> tuple[int, ...]:
    listed = axes if isinstance(axes, Iterable) else (axes,)
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
