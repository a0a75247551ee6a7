"""Trains a model: `python -m train.main --config=configs/FILE.py --workdir=DIR`."""

from pathlib import Path

from ml_collections import ConfigDict

from train import cli, loop
from train.processes import collective, distributed, peers
from train.system.terminal import Terminal


def main(config: ConfigDict, workdir: Path) -> None:
    """Trains the model of the config, or resumes the run in the workdir."""
    distributed.initialise()
    with peers.ended_with_peers():
        distributed.check_same_config(config)
        loop.run(config, workdir, Terminal(quiet=not collective.is_first()))


if __name__ == "__main__":
    cli.launch(main)
