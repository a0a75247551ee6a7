"""Writes the weights of a checkpoint to a file for other programs.

`python -m train.export --workdir=DIR --output=FILE.safetensors [--step=last]`
"""

from pathlib import Path

import jax

from train import cli, weights
from train.config import config as config_lib
from train.config import flags as config_flags
from train.config.flags import output_path
from train.engine import job as job_lib
from train.engine import mesh as mesh_lib
from train.runs import restoration
from train.system.terminal import Terminal

config_flags.output()


def main(workdir: Path) -> None:
    """Writes parameters (averaged ones if the run has them) and batch statistics."""
    output, terminal = output_path(), Terminal()
    weights.check_path(output)
    config = restoration.config_for_this_machine(workdir)
    abstract = job_lib.abstract_state(config, mesh_lib.create(config))
    step, state = restoration.restore(abstract, workdir, terminal.say)
    metadata = {"step": str(step), "config": config_lib.to_json(config)}
    weights.save(output, jax.device_get(state.variables), metadata)
    terminal.say(f"Weights: {output}")


if __name__ == "__main__":
    cli.launch_on_workdir(main)
