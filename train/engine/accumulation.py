"""Gradients of a batch from its parts, one after the other."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

# Of parameters, batch statistics, batch and random state: gradients of a mean, and with
# them sums over the batch and the new batch statistics.
GradientFn = Callable[[Any, Any, Any, Array], tuple[Any, tuple[Any, Any]]]


def accumulate(gradient_fn: GradientFn, parts: int) -> GradientFn:
    """The function that calls another on each part of a batch, and adds up.

    Its memory is that of a part, and a copy of the gradients. Gradients are the mean
    over the parts; sums are of all; batch statistics go from part to part, so batch
    norm normalises each part by itself. Every part has its own random state.

    Part i has the examples i, i + parts, i + 2 parts, ...: of a batch whose examples
    are split over devices in order, each device has as many of every part.

    Args:
      gradient_fn: of one part.
      parts: how many; they divide the batch.
    """

    def accumulated(
        params: Any, batch_stats: Any, batch: Any, rng: Array
    ) -> tuple[Any, tuple[Any, Any]]:
        split = jax.tree.map(lambda array: _split(array, parts), batch)

        def add(carry: Any, inputs: Any) -> tuple[Any, None]:
            total, stats = carry
            part, number = inputs
            gradients, (sums, stats) = gradient_fn(
                params, stats, part, jax.random.fold_in(rng, number)
            )
            return (jax.tree.map(jnp.add, total, (gradients, sums)), stats), None

        first = jax.tree.map(lambda array: array[0], split)
        shapes = jax.eval_shape(gradient_fn, params, batch_stats, first, rng)
        gradients, (sums, _) = jax.tree.map(jnp.zeros_like, shapes)
        carry = ((gradients, sums), batch_stats)
        numbers = jnp.arange(parts)
        ((gradients, sums), stats), _ = jax.lax.scan(add, carry, (split, numbers))
        return jax.tree.map(lambda g: g / parts, gradients), (sums, stats)

    return accumulated


def _split(array: Array, parts: int) -> Array:
    size, *rest = array.shape
    return jnp.swapaxes(array.reshape(size // parts, parts, *rest), 0, 1)
