"""Makes the state before the first step."""

from typing import Any

import jax

from train import weights
from train.engine import step as step_lib
from train.engine.job import Job


def initial_state(job: Job) -> step_lib.State:
    """Returns a state with random parameters, or with the weights of `init_from`.

    Raises:
      WeightsError: the file cannot be read, or does not fit the model.
    """
    path, abstract = job.config.init_from, job.abstract
    if not path:
        return step_lib.initialise(job.config, job.shardings)
    wanted = {"params": abstract.params, "batch_stats": abstract.batch_stats}
    loaded = weights.load(path, wanted)  # first, as it may fail and is fast
    state = step_lib.initialise(job.config, job.shardings)
    state = state.replace(
        params=jax.tree.map(_placed, loaded["params"], state.params),
        batch_stats=jax.tree.map(_placed, loaded["batch_stats"], state.batch_stats),
    )
    if not job.config.ema_decay:
        return state
    # A copy, since a step that donates its state must not get an array twice.
    copy = jax.jit(lambda params: jax.tree.map(jax.numpy.copy, params))
    return state.replace(ema_params=copy(state.params))


def _placed(loaded: Any, initial: jax.Array) -> jax.Array:
    """Returns a loaded array with the sharding of the initial one.

    Every process has loaded the whole array. If the file had none, returns `initial`.
    """
    if isinstance(loaded, jax.ShapeDtypeStruct):  # the file had none
        return initial
    return jax.make_array_from_callback(
        initial.shape, initial.sharding, loaded.__getitem__
    )
