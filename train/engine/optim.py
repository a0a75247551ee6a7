"""Makes the optimiser and the learning rate schedule of a config."""

from collections.abc import Callable

import jax
import optax
from ml_collections import ConfigDict


def schedule(
    config: ConfigDict, steps_per_epoch: int, total_steps: int
) -> optax.Schedule:
    """Returns the learning rate as a function of the step.

    The rate rises linearly from 0 to the peak over `warmup_epochs`, or over all steps
    but the last if the run is shorter. With `name="cosine"` it then follows a half
    cosine to 0 at `total_steps` (Loshchilov and Hutter, 2017). With `name="step"` it is
    multiplied by `decay_factor` at each of `decay_epochs`; those within the warm-up
    take effect at its end.

    Args:
      config: the config, with the section `schedule` and the peak,
        `optimizer.learning_rate`.
      steps_per_epoch: the number of steps in an epoch.
      total_steps: the number of steps in the run.
    """
    peak = config.optimizer.learning_rate
    warmup_steps = min(
        round(config.schedule.warmup_epochs * steps_per_epoch), total_steps - 1
    )
    warmup = optax.linear_schedule(0.0, peak, warmup_steps)
    if config.schedule.name == "cosine":
        decay = optax.cosine_decay_schedule(peak, total_steps - warmup_steps)
    else:
        boundaries: dict[int, float] = {}
        for epoch in config.schedule.decay_epochs:
            step = round(epoch * steps_per_epoch) - warmup_steps
            boundaries[step] = boundaries.get(step, 1) * config.schedule.decay_factor
        decay = optax.piecewise_constant_schedule(peak, boundaries)
    return optax.join_schedules([warmup, decay], [warmup_steps])


def values(schedule: optax.Schedule) -> Callable[[int], float]:
    """Returns a schedule as a function from a Python number to a Python number.

    Its transfers to and from the device are explicit.
    """
    compiled = jax.jit(schedule)
    return lambda step: float(jax.device_get(compiled(jax.device_put(step))))


def optimizer(
    config: ConfigDict, learning_rate: optax.Schedule
) -> optax.GradientTransformation:
    """Returns SGD with momentum, with weight decay for kernels only.

    First, if the norm of all gradients together is above `clip_norm`, they are scaled
    to this norm; 0 disables clipping. Then the decay is added to the gradients, before
    the momentum, as in PyTorch.
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
    # By name, not by rank: biases of scanned blocks have two axes, too.
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key == "kernel", params
    )
