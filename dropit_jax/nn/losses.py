"""Softmax cross-entropies that cache two numbers a row.

For logits x of one row,

    m = max(x)    s = Σ exp(x - m)    log softmax(x) = x - m - log(s)

and all that the backward pass needs beside its arguments is m and s, from which it
computes the softmax anew. Autodiff keeps exp(x - m) and, for the gradient of labels,
log softmax(x) too, each as large as the logits; in a compiled step it is left to XLA
whether they stay. m + log(s) would be one number, but for large logits a less exact
one: the gradient would lose what the sum rounds off.

Classes are along the last axis, as in `optax` by default. m and s are in float32 at
least, and cached under the function's name (`jax.ad_checkpoint.checkpoint_name`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Integer, Shaped

from dropit_jax.storage import dtypes
from dropit_jax.xla import shardings


def softmax_cross_entropy_with_integer_labels(
    logits: Float[Array, "*rows classes"], labels: Integer[Array, "*rows"]
) -> Float[Array, "*rows"]:
    """`log Σ exp(x) - x[label]` for each row; caches the arguments and two numbers.

    The value comes from the same operations as in the `optax` function of the same
    name, and is NaN as there for labels that are no class. The gradient,
    `softmax(x) - onehot(label)`, equals its to rounding; it is computed in float32 at
    least, and rounded once.

    Args:
      logits: any real floating dtype.
      labels: integers from 0; negative ones count from the last class.

    Raises:
      TypeError: the logits are not floating, or the labels not integers.
      ValueError: there is not one label a row.
    """
    _check_logits(logits)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"Labels must be integers, got {labels.dtype}.")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            "One label a row of logits is needed, got labels of shape "
            f"{labels.shape} for logits of shape {logits.shape}."
        )
    return _hard(logits, labels)


def softmax_cross_entropy(
    logits: Float[Array, "..."], labels: Shaped[Array, "..."]
) -> Float[Array, "..."]:
    """`-Σ label · log softmax(x)` for each row; caches the arguments and two numbers.

    The value comes from the same operations as in the `optax` function of the same
    name, and is NaN as there where a logit is -inf, whatever its label. The gradients,
    `softmax(x) · Σ label - label` and `-log softmax(x)`, equal its to rounding; they
    are computed in float32 at least, and rounded once.

    Args:
      logits: any real floating dtype.
      labels: the probability of each class, which need not add up to 1; of a shape that
        broadcasts with that of the logits. What is broadcast is cached so.

    Raises:
      TypeError: the logits are not floating.
      ValueError: the shapes do not broadcast, or only by repeating the logits of a row.
    """
    _check_logits(logits)
    shape = jnp.broadcast_shapes(logits.shape, labels.shape)
    if shape[-1] != logits.shape[-1]:
        raise ValueError(
            f"Labels of shape {labels.shape} have more classes than logits of shape "
            f"{logits.shape}."
        )
    return _soft(jnp.broadcast_to(logits, shape), jnp.broadcast_to(labels, shape))


def _check_logits(logits: Array) -> None:
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"Logits must be floating-point numbers, got {logits.dtype}.")
    if not logits.ndim:
        raise ValueError("Logits need an axis of classes, got a scalar.")


class _Saved(NamedTuple):
    """The arrays that the backward pass reads.

    Attributes:
      logits: the argument.
      labels: the argument.
      maximum: m of each row.
      total: s of each row.
    """

    logits: Float[Array, "*rows classes"]
    labels: Shaped[Array, "..."]
    maximum: Float[Array, "*rows"]
    total: Float[Array, "*rows"]

    def exponentials(self) -> Float[Array, "*rows classes"]:
        """exp(x - m)."""
        return jnp.exp(_shifted(self.logits, self.maximum))


def _save(logits: Array, labels: Array, maximum: Array, name: str) -> _Saved:
    total = jnp.exp(_shifted(logits, maximum)).sum(-1)
    return _Saved(logits, labels, *checkpoint_name((maximum, total), name))


def _load(saved: _Saved, cotangent: Array) -> tuple[_Saved, Array]:
    """The saved arrays, and the cotangent to go on with."""
    # Without the barrier XLA may compute the softmax early and keep it alive. Labels
    # stay out of it: where they are computed, XLA can do so anew (`jax.nn.one_hot`).
    *read, cotangent = lax.optimization_barrier(
        (saved.logits, saved.maximum, saved.total, cotangent)
    )
    logits, maximum, total = read
    return _Saved(logits, saved.labels, maximum, total), cotangent


def _shifted(logits: Array, maximum: Array) -> Array:
    """The logits less their maximum, in the wider type of the latter."""
    return logits.astype(maximum.dtype) - maximum[..., None]


def _maximum(logits: Array) -> Array:
    # Without a derivative: what it adds to both terms of the loss cancels.
    largest = lax.stop_gradient(jnp.max(logits, axis=-1, initial=-jnp.inf))
    return largest.astype(dtypes.wide(logits.dtype))


def _finite_or_0(x: Array) -> Array:
    return jnp.where(jnp.isfinite(x), x, 0)


def _hard_value(logits: Array, labels: Array) -> Array:
    # Not by indexing, which would move classes that are shared out between devices.
    is_label = _is_label(logits, labels)
    label_logits = jnp.where(is_label, logits, 0).sum(-1)
    label_logits = jnp.where(is_label.any(-1), label_logits, jnp.nan)
    return jax.nn.logsumexp(logits, axis=-1) - label_logits


_hard = jax.custom_vjp(_hard_value)


def _is_label(logits: Array, labels: Array) -> Bool[Array, "*rows classes"]:
    classes = logits.shape[-1]
    # An integer type of 8 bits may be too small for the number of classes.
    labels = labels.astype(dtypes.common(labels.dtype, jnp.int32))
    labels = jnp.where(labels < 0, labels + classes, labels)
    each = lax.expand_dims(lax.iota(labels.dtype, classes), range(labels.ndim))
    is_label = each == labels[..., None]
    return shardings.like(is_label, logits)


def _hard_forward(logits: Array, labels: Array) -> tuple[Array, _Saved]:
    # As in `jax.nn.logsumexp`, for rows with infinities.
    maximum = _finite_or_0(_maximum(logits))
    name = "softmax_cross_entropy_with_integer_labels"
    return _hard_value(logits, labels), _save(logits, labels, maximum, name)


def _hard_backward(saved: _Saved, cotangent: Array) -> tuple[Array, None]:
    saved, cotangent = _load(saved, cotangent)
    wide = cotangent.astype(saved.total.dtype)
    gradient = (wide / saved.total)[..., None] * saved.exponentials()
    share = jnp.where(_is_label(saved.logits, saved.labels), -wide[..., None], 0)
    return (gradient + share).astype(saved.logits.dtype), None


_hard.defvjp(_hard_forward, _hard_backward)


def _soft_value(logits: Array, labels: Array) -> Array:
    return -(labels * jax.nn.log_softmax(logits)).sum(-1)


_soft = jax.custom_vjp(_soft_value)


def _soft_forward(logits: Array, labels: Array) -> tuple[Array, _Saved]:
    saved = _save(logits, labels, _maximum(logits), "softmax_cross_entropy")
    return _soft_value(logits, labels), saved


def _soft_backward(saved: _Saved, cotangent: Array) -> tuple[Array, Array | None]:
    saved, cotangent = _load(saved, cotangent)
    logits, labels = saved.logits, saved.labels
    wide = -cotangent.astype(dtypes.common(cotangent.dtype, saved.total.dtype))
    wide = wide[..., None]
    shares = labels.astype(wide.dtype) * wide
    total = saved.total[..., None]
    gradient = shares - shares.sum(-1, keepdims=True) / total * saved.exponentials()
    gradient = gradient.astype(logits.dtype)
    if not jnp.issubdtype(labels.dtype, jnp.floating):
        return gradient, None
    log_softmax = _shifted(logits, saved.maximum) - jnp.log(total)
    return gradient, (wide * log_softmax).astype(labels.dtype)


_soft.defvjp(_soft_forward, _soft_backward)
