"""Evaluates a checkpoint: `python -m train.evaluate --workdir=DIR [--step=last]`."""

import math
from pathlib import Path

from train import cli
from train.config import flags as config_flags
from train.engine import job as job_lib
from train.engine.evaluator import evaluator
from train.runs import restoration
from train.system.disk import CheckpointError
from train.system.terminal import Terminal

_DATA_DIR = config_flags.data_dir()


def main(workdir: Path) -> None:
    """Prints loss and accuracy of a run's checkpoint on the test examples."""
    config, terminal = restoration.config_for_this_machine(workdir), Terminal()
    if _DATA_DIR.value:
        config.data_dir = _DATA_DIR.value
    job = job_lib.prepare(config)
    step, state = restoration.restore(job.abstract, workdir, terminal.say)
    test = evaluator(job)(state)
    if not math.isfinite(test.loss):
        raise CheckpointError(
            f"The checkpoint of step {step} has a test loss of {test.loss}: take "
            "another --step."
        )
    terminal.say(
        f"step {step}  test loss {test.loss:.4f}  accuracy {test.accuracy:.2%}  "
        f"top-5 accuracy {test.top5_accuracy:.2%}  of {test.count:,.0f} images"
    )


if __name__ == "__main__":
    cli.launch_on_workdir(main)
