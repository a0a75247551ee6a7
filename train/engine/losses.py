"""The loss, the top-k accuracy, and the weights of mixed images."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


def cross_entropy(
    logits: Float[Array, "batch classes"],
    labels: Int[Array, "batch"],
    smoothing: float = 0.0,
) -> Float[Array, "batch"]:
    """Returns each example's cross-entropy with its smoothed label, in nats.

    -(1 - s) log p[label] - s / classes * sum_c log p[c] (Szegedy et al., 2016, §7).

    Args:
      logits: the logit of each class.
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
    """Returns whether each example's label has one of the `count` largest logits.

    Of equal logits the earlier class is the larger, as for `argmax`. For the logits
    `[[0, 2, 2]]`, the label `[2]` and `count=1`: `[False]`. If the label's own logit is
    NaN, returns false; NaN of another class is larger than every number.
    """
    right = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    earlier = jnp.arange(logits.shape[-1])[None, :] < labels[:, None]
    # Not `logits > right`, which NaN never is.
    before = ~(logits <= right) | ((logits == right) & earlier)
    return (jnp.sum(before, axis=-1) < count) & ~jnp.isnan(right[:, 0])


def mix_weight(key: Array, alpha: float) -> Float[Array, ""]:
    """Returns a random weight for the first of two mixed images (Zhang et al., 2018).

    It is the larger of a sample of Beta(alpha, alpha) and 1 minus that sample, so that
    the label of the first image is the label of the mixed image.
    """
    weight = jax.random.beta(key, alpha, alpha)
    return jnp.maximum(weight, 1 - weight)
