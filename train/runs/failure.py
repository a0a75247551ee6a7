"""A record of a step whose loss is not finite: the config and batches to repeat it."""

import contextlib
import io
import json
from pathlib import Path

import jax
import numpy as np

from train import data
from train.config import config as config_lib
from train.engine.job import Job
from train.engine.meter import NonFiniteLossError
from train.system.files import write_atomically

_DIRECTORY = "failure"


def has_failed(workdir: Path) -> bool:
    """Returns whether a run in the workdir has ended with a loss that was not finite.

    The record stays when a later start of the run succeeds.
    """
    return (workdir / _DIRECTORY).exists()


def advice(workdir: Path) -> str:
    """Returns advice to the user who restarts a run with a record of a failure."""
    return (
        f"{workdir} ended before with a loss that was not finite; {_DIRECTORY}/ has "
        "the step. The same config takes the same steps: in another --workdir, another "
        "learning rate is likely to end better."
    )


def write(workdir: Path, job: Job, error: NonFiniteLossError, checkpoint: int) -> str:
    """Writes the step, the config and the last two batches into `failure/`.

    Each process writes its own rows of the batches.

    Args:
      workdir: working directory of the run.
      job: the job that was trained.
      error: the error, with the step and the loss.
      checkpoint: the step of the last checkpoint, or 0.

    Returns:
      A message to the user, also if the files cannot be written.
    """
    directory = workdir / _DIRECTORY
    try:
        _write(directory, job, error, checkpoint)
    except (OSError, data.DataError) as problem:
        return f"{directory} cannot be written: {problem}"
    return (
        f"{directory} has the config and the last batches. The same command takes the "
        f"same steps again, from step {checkpoint}, and fails at the same one."
    )


def _write(
    directory: Path, job: Job, error: NonFiniteLossError, checkpoint: int
) -> None:
    directory.mkdir(exist_ok=True)
    # A step that makes the parameters non-finite shows only in the loss of the next.
    steps = range(max(1, error.step - 1), error.step + 1)
    rank = jax.process_index()
    for step in steps:
        content = io.BytesIO()
        np.savez(content, **_batch(job, step))
        name = f"batch-{step}-process-{rank}.npz"
        write_atomically(directory / name, content.getvalue())
    record = {
        "step": error.step,
        "loss": str(error.loss),  # JSON has no infinities
        "checkpoint": checkpoint,
        "batches": list(steps),
        "processes": jax.process_count(),
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "config": json.loads(config_lib.to_json(job.config)),
    }
    if rank == 0:
        text = json.dumps(record, indent=2) + "\n"
        write_atomically(directory / "failure.json", text)


def _batch(job: Job, step: int) -> data.Batch:
    """Returns this process's rows of a step's batch; the first step is 1."""
    batches = data.training_batches(
        job.dataset,
        job.config.batch_size,
        job.config.seed,
        start=step - 1,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    with contextlib.closing(batches):
        return next(batches)
