"""The gradient of a normalisation from its normalised input in 8 bits.

`dropit_jax.nn.norms` says which, and how near it is.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dropit_jax import derivatives
from dropit_jax.nn import eight_bits
from dropit_jax.nn.eight_bits import EightBits
from dropit_jax.storage import dtypes
from dropit_jax.xla import barriers, shardings

# The name of what is cached, for `jax.checkpoint_policies` and reports.
RESIDUAL_NAME = "norm"


@dataclasses.dataclass(frozen=True)
class Across:
    """Over which devices statistics are taken, where that is said by name.

    Attributes:
      axis_name: of `jax.pmap`, `jax.shard_map` or `jax.vmap`; `None`: over none.
      axis_index_groups: as in `jax.lax.pmean`, hashable.
    """

    axis_name: Any = None
    axis_index_groups: tuple[tuple[int, ...], ...] | None = None

    def mean(self, *sums: Array) -> tuple[Array, ...]:
        """The means over these devices, in one collective.

        Raises:
          NameError: there is no such axis; nor is there in the backward pass of
            `jax.grad` outside of `jax.vmap`.
        """
        if self.axis_name is None:
            return sums
        groups = self.axis_index_groups
        stacked = jnp.stack(sums) if len(sums) > 1 else sums[0]
        try:
            means = lax.pmean(stacked, self.axis_name, axis_index_groups=groups)
        except NameError as error:
            raise NameError(
                f"A normalisation over axis_name={self.axis_name!r}: there is no such "
                "axis here. In the backward rule of an operation JAX has the axes of "
                "jax.vmap only if the gradient is taken inside of it: take it there, "
                "use jax.shard_map, or the plain Flax layer."
            ) from error
        return tuple(means) if len(sums) > 1 else (means,)


_LOCAL = Across()


@dataclasses.dataclass(frozen=True)
class Norm:
    """The settings of a normalisation: all but its arrays.

    Attributes:
      axes: over which statistics are taken, counted from the first.
      epsilon: added to the variance.
      feature_axes: along which γ and β vary, in the order of their axes.
      groups: where given, the last axis is cut into so many, whose members share
        statistics; then it is one of `axes`.
      use_mean: whether the mean is taken off.
      constant: whether the statistics are none of x, as running averages are.
      across: over which devices statistics are taken.
    """

    axes: tuple[int, ...]
    epsilon: float
    feature_axes: tuple[int, ...] = (-1,)
    groups: int | None = None
    use_mean: bool = True
    constant: bool = False
    across: Across = _LOCAL


def statistics(
    x: Float[Array, "..."],
    norm: Norm,
    *,
    use_fast_variance: bool = True,
    mask: Array | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Mean and variance, without a gradient; `norm.axes` stay as axes of size 1.

    Operation for operation what Flax computes, so that XLA computes it once for both.

    Args:
      x: an array.
      norm: which normalisation. With groups, the last axis becomes (groups, 1).
      use_fast_variance: E[x²] - E[x]² rather than E[(x - E[x])²].
      mask: what of x counts, broadcastable to it; `None`: all.
      dtype: of the computation; `None`: float32, or x's if that is wider.
    """
    if dtype is None:
        dtype = dtypes.wide(x.dtype)
    axes = _stat_axes(x, norm)
    wide = _cut(lax.stop_gradient(x), norm).astype(dtype)
    where = None if mask is None else _cut(jnp.asarray(mask, bool), norm)

    def means(*arrays: Array) -> tuple[Array, ...]:
        return norm.across.mean(*(a.mean(axes, where=where) for a in arrays))

    if not norm.use_mean:
        (var,) = means(lax.square(wide))
        mean = jnp.zeros_like(var)
    elif use_fast_variance:
        mean, square = means(wide, lax.square(wide))
        var = jnp.maximum(0.0, square - lax.square(mean))
    else:
        (mean,) = means(wide)
        (var,) = means(lax.square(wide - jnp.expand_dims(mean, axes)))
    return with_axes(mean, x, norm), with_axes(var, x, norm)


def with_axes(
    statistic: Float[Array, "..."], x: Float[Array, "..."], norm: Norm
) -> Float[Array, "..."]:
    """A statistic as Flax has it, without `norm.axes`, as `statistics` gives it."""
    return jnp.expand_dims(statistic, _stat_axes(x, norm))


def with_compact_gradient(
    y: Float[Array, "*shape"],
    x: Float[Array, "*shape"],
    mean: Float[Array, "..."],
    var: Float[Array, "..."],
    scale: Float[Array, "..."] | None,
    bias: Float[Array, "..."] | None,
    norm: Norm,
    mask: Array | None = None,
) -> Float[Array, "*shape"]:
    """`y`, with the gradient of the normalisation that made it from the rest.

    Args:
      y: what a normalisation gave. Its own gradient is not used.
      x: what was normalised.
      mean: of `statistics`.
      var: of `statistics`.
      scale: γ, with an axis for each of `norm.feature_axes`; `None`: 1.
      bias: β, likewise; `None`: 0.
      norm: which normalisation.
      mask: what of x the statistics are of; `None`: all.
    """
    y, mean, var = map(lax.stop_gradient, (y, mean, var))
    x, scale, bias = shardings.varying_alike((x, scale, bias), like=y)
    return _compact(norm, y, x, mean, var, scale, bias, mask)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("x_hat", "inverse", "scale", "mask"),
    meta_fields=("dtype", "bias"),
)
@dataclasses.dataclass(frozen=True)
class _Saved:
    """The arrays that the backward pass reads.

    Attributes:
      x_hat: the normalised input; `None` where no gradient takes it.
      inverse: 1 / √(σ² + ε).
      scale: γ.
      mask: what of x the statistics are of.
      dtype: of x.
      bias: the type of β; `None`: there is none.
    """

    x_hat: EightBits | None
    inverse: Array
    scale: Array | None
    mask: Array | None
    dtype: Any
    bias: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _compact(
    norm: Norm,
    y: Array,
    x: Array,
    mean: Array,
    var: Array,
    scale: Array | None,
    bias: Array | None,
    mask: Array | None,
) -> Array:
    del norm, x, mean, var, scale, bias, mask
    return y


def _forward(
    norm: Norm,
    y: Array,
    x: Array,
    mean: Array,
    var: Array,
    scale: Array | None,
    bias: Array | None,
    mask: Array | None,
) -> tuple[Array, _Saved]:
    x = derivatives.once(x, "A normalisation")
    inverse = checkpoint_name(lax.rsqrt(var + norm.epsilon), RESIDUAL_NAME)
    stored = None
    if scale is not None or not norm.constant:
        _, stored = eight_bits.store(_normalised(x, mean, inverse, norm), RESIDUAL_NAME)
    saved = _Saved(
        x_hat=stored,
        inverse=inverse,
        scale=scale,
        mask=mask,
        dtype=x.dtype,
        bias=None if bias is None else jax.typeof(bias),
    )
    return y, saved


def _backward(
    norm: Norm, saved: _Saved, cotangent: Array
) -> tuple[None, Array, None, None, Array | None, Array | None, None]:
    # Else XLA may decode early and keep what is decoded alive.
    x_hat = barriers.read_after(cotangent, saved.x_hat)
    decoded = None if x_hat is None else eight_bits.load(x_hat)
    rest = dataclasses.replace(saved, x_hat=None)
    to_x, to_scale, to_bias = _gradients(norm, rest, decoded, cotangent)
    return None, to_x, None, None, to_scale, to_bias, None


_compact.defvjp(_forward, _backward)


# Traced once for all layers of one shape, and so is what follows.
@functools.partial(jax.jit, static_argnames="norm", inline=True)
def _normalised(x: Array, mean: Array, inverse: Array, norm: Norm) -> Array:
    return (x - spread(mean, x, norm)) * spread(inverse, x, norm)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _gradients(
    norm: Norm, saved: _Saved, decoded: Array | None, cotangent: Array
) -> tuple[Array, Array | None, Array | None]:
    """The gradients of x, γ and β."""
    dtype = dtypes.wide(saved.inverse.dtype, saved.dtype, cotangent.dtype)
    x_hat: Any = None
    if decoded is not None:
        x_hat = shardings.like(decoded.astype(dtype), cotangent)
    g = cotangent.astype(dtype)
    factor = spread(saved.inverse, g, norm)
    to_scale = to_bias = None
    h = g
    if saved.scale is not None:
        gamma = along(saved.scale, g, norm).astype(dtype)
        to_scale = _sum_to(g * x_hat, norm, jax.typeof(saved.scale))
        if _is_alike_along_statistics(g, norm):
            # A factor of the means: their sums are then those of ∇β and ∇γ.
            factor = factor * gamma
        else:
            h = g * gamma
    if saved.bias is not None:
        to_bias = _sum_to(g, norm, saved.bias)
    to_x = h
    if not norm.constant:
        to_x = h - _through_statistics(h, x_hat, saved.mask, norm)
    return (to_x * factor).astype(saved.dtype), to_scale, to_bias


def _is_alike_along_statistics(x: Array, norm: Norm) -> bool:
    """Whether elements of x that share statistics share γ."""
    axes = ({axis % x.ndim for axis in each} for each in (norm.axes, norm.feature_axes))
    return set.isdisjoint(*axes)


def _through_statistics(
    h: Array, x_hat: Array, mask: Array | None, norm: Norm
) -> Array:
    """mean(h) + x̂ · mean(h x̂), where the mask lets it through."""
    grouped, axes = _cut(h, norm), _stat_axes(h, norm)
    total = functools.partial(jnp.sum, axis=axes, keepdims=True)
    products = total(grouped * _cut(x_hat, norm))
    sums = norm.across.mean(*((total(grouped),) if norm.use_mean else ()), products)
    if mask is None:
        count: Any = math.prod(grouped.shape[axis] for axis in axes)
    else:
        weights = jnp.broadcast_to(jnp.asarray(mask, h.dtype), h.shape)
        count = total(_cut(weights, norm))
    means = [spread(value / count, h, norm) for value in sums]
    through = x_hat * means[-1] + (means[0] if norm.use_mean else 0)
    return through if mask is None else through * weights


def _cut(x: Array, norm: Norm) -> Array:
    """`x` with an axis for the groups before the last, where there are groups."""
    if norm.groups is None:
        return x
    return x.reshape(*x.shape[:-1], norm.groups, x.shape[-1] // norm.groups)


def _stat_axes(x: Array, norm: Norm) -> tuple[int, ...]:
    """The axes of `_cut(x)` over which statistics are taken."""
    axes = tuple(axis % x.ndim for axis in norm.axes)
    if norm.groups is None:
        return axes
    return tuple(x.ndim if axis == x.ndim - 1 else axis for axis in axes)


def spread(statistic: Array, x: Array, norm: Norm) -> Array:
    """A statistic of `_cut(x)`, in a shape that broadcasts to that of x."""
    if norm.groups is None:
        return statistic
    size = x.shape[-1] // norm.groups
    spread = jnp.repeat(statistic, size, axis=-1)
    return spread.reshape(*statistic.shape[:-2], x.shape[-1])


def along(parameter: Array, x: Array, norm: Norm) -> Array:
    """γ or β in a shape that broadcasts to that of x."""
    axes = {axis % x.ndim for axis in norm.feature_axes}
    shape = [size if axis in axes else 1 for axis, size in enumerate(x.shape)]
    return parameter.reshape(shape)


def _sum_to(x: Array, norm: Norm, parameter: Any) -> Array:
    """The gradient of γ or β, of this type, from that of what it is broadcast to."""
    kept = {axis % x.ndim for axis in norm.feature_axes}
    summed = tuple(axis for axis in range(x.ndim) if axis not in kept)
    total = jnp.sum(x, axis=summed).astype(parameter.dtype)
    return shardings.to(total, tuple(parameter.sharding.spec))
