"""Makes a training step for any loss."""

from collections.abc import Callable
from typing import Any

import jax
import optax

Step = Callable[..., Any]

OPTIMIZER = optax.sgd(0.1, momentum=0.9)
# The donated arguments of a step: the variables and the optimizer's state.
DONATED = (0, 1)


def training_step(loss: Callable[..., Any]) -> Step:
    """Returns a training step of SGD with momentum.

    Args:
      loss: a function `(params, other variables, *batch)` that returns the loss and
        the new other variables.

    Returns:
      A function `(variables, opt_state, *batch)` that returns the new variables and the
      new optimizer's state. `variables` has the parameters as `"params"`.
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
