"""A training step of any loss."""

from collections.abc import Callable
from typing import Any

import jax
import optax

Step = Callable[..., Any]

OPTIMIZER = optax.sgd(0.1, momentum=0.9)
# Of the arguments of a step, the variables and the optimizer's state are donated.
DONATED = (0, 1)


def training_step(loss: Callable[..., Any]) -> Step:
    """A step of SGD with momentum.

    Args:
      loss: a function of the parameters, the other variables and a batch that returns a
        loss, and the other variables after the step.

    Returns:
      A function of all variables, the optimizer's state and a batch, that returns the
      first two as they are after the step.
    """

    def step(
        variables: dict[str, Any], opt_state: optax.OptState, *batch: Any
    ) -> tuple[dict[str, Any], optax.OptState]:
        params, others = variables["params"], dict(variables)
        del others["params"]
        gradients, updates = jax.grad(loss, has_aux=True)(params, others, *batch)
        changes, opt_state = OPTIMIZER.update(gradients, opt_state)
        params = optax.apply_updates(params, changes)
        return {"params": params, **updates}, opt_state

    return step
