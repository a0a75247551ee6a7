"""Computes the gradients of a batch part by part, to save memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

# (params, batch_stats, batch, rng) -> (gradients of the batch's mean loss, (sums of the
# batch, new batch_stats)).
GradientFn = Callable[[Any, Any, Any, Array], tuple[Any, tuple[Any, Any]]]


def accumulate(gradient_fn: GradientFn, parts: int) -> GradientFn:
    """Returns a gradient function that calls `gradient_fn` on the parts of a batch.

    The parts are computed one after the other. The function returns the mean of their
    gradients, the sums over all parts, and the batch statistics, which each part passes
    to the next. A batch norm normalises each part by itself. Each part has its own
    random state. The memory is that of a part, plus a copy of the gradients.

    Part i has the examples i, i + parts, i + 2 parts, ... So each device, which holds
    consecutive examples, has equally many of every part: 8 examples on 2 devices are
    split into the 2 parts (0, 2, 4, 6) and (1, 3, 5, 7).

    Args:
      gradient_fn: computes the gradients of a part.
      parts: the number of parts, a divisor of the batch's size.
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
