"""What is minimised, and what is counted."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


def cross_entropy(
    logits: Float[Array, "batch classes"],
    labels: Int[Array, "batch"],
    smoothing: float = 0.0,
) -> Float[Array, "batch"]:
    """Cross-entropy with smoothed labels, in nats.

    -(1 - s) log p[label] - s / classes * sum_c log p[c] (Szegedy et al., 2016, §7).

    Args:
      logits: of each class.
      labels: the right classes.
      smoothing: s, in [0, 1).
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if not smoothing:
        return losses
    uniform = -jnp.mean(jax.nn.log_softmax(logits), axis=-1)
    return (1 - smoothing) * losses + smoothing * uniform


def is_among_largest(
    logits: Float[Array, "batch classes"], labels: Int[Array, "batch"], count: int
) -> Array:
    """Whether fewer than `count` classes come before the right one.

    Those of larger logits do and, as for `argmax`, the earlier ones of equal logits.
    NaN is not among the largest.
    """
    right = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    earlier = jnp.arange(logits.shape[-1])[None, :] < labels[:, None]
    # Not `logits > right`, which NaN never is.
    before = ~(logits <= right) | ((logits == right) & earlier)
    return (jnp.sum(before, axis=-1) < count) & ~jnp.isnan(right[:, 0])


def mix_weight(key: Array, alpha: float) -> Float[Array, ""]:
    """The weight of the first of two images that are mixed (Zhang et al., 2018).

    From Beta(alpha, alpha), or 1 minus that, whichever is larger: so that the label of
    the first is that of the mixed image.
    """
    weight = jax.random.beta(key, alpha, alpha)
    return jnp.maximum(weight, 1 - weight)
