"""Reading of the config and a checkpoint of a finished or stopped run."""

from collections.abc import Callable
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

from train.config import validation
from train.engine import step as step_lib
from train.runs import workdir as workdir_lib
from train.runs.checkpoints import Checkpoints
from train.system.disk import CheckpointError
from train.system.text import shorten

_STEP = flags.DEFINE_string(
    "step", "best", "Which checkpoint: best, of test accuracy; last; or its step."
)


def config_for_this_machine(workdir: Path) -> ConfigDict:
    """Returns the config of the run in a workdir, adapted to this machine.

    All devices split the batch, whose size is rounded up to a multiple of their number.
    Steps are not accumulated, and workers are limited to what this machine can use.

    Raises:
      ConfigError: the workdir holds no run, or its config cannot be run.
      DataError: the description of the prepared dataset is damaged.
    """
    config = workdir_lib.read_config(workdir)
    devices = jax.device_count()
    with config.unlocked(), config.ignore_type():
        config.mesh = ConfigDict({"data": -1, "fsdp": 1})
    validation.validate(config)
    config.workers = min(config.workers, validation.most_workers(config))
    config.accumulate_steps = 1
    config.batch_size = -(-config.batch_size // devices) * devices
    return config


def restore(
    abstract: step_lib.State, workdir: Path, say: Callable[[str], None]
) -> tuple[int, step_lib.State]:
    """Returns the step and the state of the checkpoint that `--step` selects.

    Args:
      abstract: shapes, dtypes and shardings of the state.
      workdir: working directory of the run; nothing in it is changed.
      say: called with a message that names the checkpoint.

    Raises:
      CheckpointError: there is no such checkpoint, or it cannot be read.
      WaitError: the disk does not answer.
    """
    with workdir_lib.read_checkpoints(workdir) as checkpoints:
        step = _selected_step(checkpoints, workdir)
        say(f"{workdir}: the checkpoint of step {step}.")
        state, _ = checkpoints.restore(step, abstract)
    return step, state


def _selected_step(checkpoints: Checkpoints, workdir: Path) -> int:
    steps, wanted = checkpoints.steps(), _STEP.value
    if not steps:
        raise CheckpointError(f"{workdir} has no checkpoint.")
    if wanted == "last":
        return steps[-1]
    if wanted == "best":
        best = checkpoints.best_step()
        if best is None:
            raise CheckpointError(
                f"{workdir} has no checkpoint that was evaluated: take --step=last."
            )
        return best
    if wanted not in map(str, steps):
        raise CheckpointError(
            f"--step={shorten(wanted)}: {workdir} has best, last and "
            f"{', '.join(map(str, steps))}."
        )
    return int(wanted)
