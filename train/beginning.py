"""The state before the first step."""

from typing import Any

import jax

from train import step as step_lib
from train import weights
from train.job import Job


def initial_state(job: Job) -> step_lib.State:
    """Random parameters, or the weights of `config.init_from`.

    Raises:
      WeightsError: the file cannot be read, or does not fit the model.
    """
    state, path = step_lib.initialise(job.config, job.shardings), job.config.init_from
    if not path:
        return state
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    loaded = weights.load(path, variables)
    state = state.replace(
        params=_placed(loaded["params"], job.shardings.params),
        batch_stats=_placed(loaded["batch_stats"], job.shardings.batch_stats),
    )
    if not job.config.ema_decay:
        return state
    # A copy: a step that is given both must not be given one array twice.
    copy = jax.jit(lambda params: jax.tree.map(jax.numpy.copy, params))
    return state.replace(ema_params=copy(state.params))


def _placed(arrays: Any, shardings: Any) -> Any:
    """NumPy arrays, which every process has whole, on the devices."""

    def put(array: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
        if isinstance(array, jax.Array):  # is there: the file had none for it
            return array
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    return jax.tree.map(put, arrays, shardings)
