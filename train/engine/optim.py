"""The optimiser and its learning rate, as a config describes them."""

from collections.abc import Callable

import jax
import optax
from ml_collections import ConfigDict


def schedule(
    config: ConfigDict, steps_per_epoch: int, total_steps: int
) -> optax.Schedule:
    """The learning rate at each step.

    It rises linearly from 0 over `config.warmup_epochs`, and then follows a half cosine
    to 0 at `total_steps` (`name="cosine"`, Loshchilov and Hutter, 2017), or is
    multiplied by `config.decay_factor` at each of `config.decay_epochs`
    (`name="step"`).

    Args:
      config: the `schedule` section, and the peak as `learning_rate`.
      steps_per_epoch: steps in an epoch.
      total_steps: steps in the whole run.
    """
    peak = config.optimizer.learning_rate
    warmup_steps = min(
        round(config.schedule.warmup_epochs * steps_per_epoch), total_steps - 1
    )
    warmup = optax.linear_schedule(0.0, peak, warmup_steps)
    if config.schedule.name == "cosine":
        decay = optax.cosine_decay_schedule(peak, total_steps - warmup_steps)
    else:
        boundaries = {
            round(epoch * steps_per_epoch) - warmup_steps: config.schedule.decay_factor
            for epoch in config.schedule.decay_epochs
        }
        decay = optax.piecewise_constant_schedule(peak, boundaries)
    return optax.join_schedules([warmup, decay], [warmup_steps])


def values(schedule: optax.Schedule) -> Callable[[int], float]:
    """A schedule as a function of a step's number, which moves no array unasked."""
    compiled = jax.jit(schedule)
    return lambda step: float(jax.device_get(compiled(jax.device_put(step))))


def optimizer(
    config: ConfigDict, learning_rate: optax.Schedule
) -> optax.GradientTransformation:
    """SGD with momentum, and weight decay on kernels (not on biases and norms).

    The decay joins the gradient before the momentum, as in PyTorch.
    Before that, gradients whose norm, of all together, is above `clip_norm` are scaled
    to it; 0 leaves them as they are.
    """
    section = config.optimizer
    clip = (
        optax.clip_by_global_norm(section.clip_norm)
        if section.clip_norm
        else optax.identity()
    )
    return optax.chain(
        clip,
        optax.add_decayed_weights(section.weight_decay, mask=_kernels),
        optax.sgd(learning_rate, section.momentum, nesterov=section.nesterov),
    )


def _kernels(params: optax.Params) -> optax.Params:
    # By name: of blocks that are scanned, biases have two axes as well.
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key == "kernel", params
    )
