"""What the norm layers of `linen` and `nnx` have in common."""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from jaxtyping import Array

from dropit_jax import compat
from dropit_jax.nn.norm_gradient import Across, Norm


def describe(layer: Any, x: Array, kinds: Sequence[type], constant: bool) -> Norm:
    """What a layer does.

    Args:
      layer: of `flax.linen` or `flax.nnx`, whose attributes have the same names.
      x: what it normalises.
      kinds: the classes that its own is one of, in the order of `linen.norms.LAYERS`.
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

    Where a version of Flax has no hook for this, nothing is noted.

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
    compat.wrap_flax_statistics(flax, _noted_by)


def _noted_by(compute: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(compute)
    def compute_and_note(*args: Any, **kwargs: Any) -> tuple[Array, Array]:
        statistics: tuple[Array, Array] = compute(*args, **kwargs)
        if (noted := _noted.get()) is not None:
            noted.append(statistics)
        return statistics

    return compute_and_note


def _groups(layer: Any, x: Array) -> int:
    if layer.group_size is None:
        return layer.num_groups
    return x.shape[-1] // layer.group_size


def _axes(axes: Any, x: Array) -> tuple[int, ...]:
    listed = axes if isinstance(axes, Iterable) else (axes,)
    return tuple(sorted({axis % x.ndim for axis in listed}))


def _hashable(groups: Any) -> tuple[tuple[int, ...], ...] | None:
    return None if groups is None else tuple(tuple(group) for group in groups)
