"""Runs the commands of `train` as a user does, on a task of seconds."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dropit_jax import memory
from train import records

_ROOT = Path(__file__).parents[2]

TINY = (
    "--config=configs/digits_resnet18.py",
    "--config.image_size=8",
    "--config.model.width=4",
    "--config.batch_size=32",
    "--config.num_epochs=6",
    "--config.optimizer.learning_rate=0.05",
)

# What is compiled once is not compiled again by the next command.
_CACHE = Path(tempfile.gettempdir()) / f"dropit-jax-tests-{os.getuid()}"


def start(module, *arguments, devices=1, variables=()):
    """Starts `python -m module`; its output is text."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(_CACHE),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        # Compiled as for users: rounding decides what is trained in the end.
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        **dict(variables),
    }
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=_ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(module, *arguments, devices=1, variables=()):
    """Runs `python -m module` to its end: (exit status, output, errors)."""
    process = start(module, *arguments, devices=devices, variables=variables)
    out, errors = process.communicate()
    if process.returncode == 2 and errors.startswith("error: XLA's GPU compiler"):
        raise memory.CompilerMissingError(errors)
    return process.returncode, out, errors


def wait_for(condition, process):
    """Waits until a condition holds, which it does before the process ends."""
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"It ended too early: {process.communicate()}")
        time.sleep(0.01)


def metrics(workdir):
    """The rows of a run, but for what depends on the clock."""
    clocked = ("images_per_second", "data_wait")
    return [
        {name: value for name, value in row.items() if name not in clocked}
        for row in records.read(workdir / "metrics.csv")
    ]


def steps(workdir):
    """The steps of a run's whole checkpoints."""
    paths = (workdir / "checkpoints").glob("*")
    return sorted(int(path.name) for path in paths if path.name.isdigit())
