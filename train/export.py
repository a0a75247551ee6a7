"""Writes a checkpoint's weights for other programs.

`python -m train.export --workdir=DIR --output=FILE.safetensors [--step=last]`
"""

from pathlib import Path

import jax
from absl import flags

from train import cli, restoration, weights
from train import config as config_lib
from train import job as job_lib
from train import mesh as mesh_lib
from train.terminal import Terminal

_OUTPUT = flags.DEFINE_string(
    "output", None, "The .safetensors file to write.", required=True
)


def main(workdir: Path) -> None:
    """Writes parameters, averaged ones if the run has them, and batch statistics."""
    weights.check_path(_OUTPUT.value)
    config, terminal = restoration.config_of(workdir), Terminal()
    abstract = job_lib.abstract_state(config, mesh_lib.create(config))
    step, state = restoration.restore(abstract, workdir, terminal.say)
    metadata = {"step": str(step), "config": config_lib.to_json(config)}
    weights.save(_OUTPUT.value, jax.device_get(state.variables), metadata)
    terminal.say(f"Weights: {_OUTPUT.value}")


if __name__ == "__main__":
    cli.launch_on_run(main)
