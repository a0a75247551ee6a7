"""The last state of a finished run, with a batch to measure it on."""

from pathlib import Path

from ml_collections import ConfigDict

from train import data
from train.config import config as config_lib
from train.engine import job as job_lib
from train.engine import step as step_lib
from train.engine.job import Job
from train.runs import workdir as workdir_lib
from train.system.disk import CheckpointError


def load(config: ConfigDict, workdir: Path) -> tuple[Job, step_lib.State, data.Batch]:
    """Returns the job, the state after the last step, and the first training batch.

    Args:
      config: config of the run.
      workdir: working directory of the run; nothing in it is changed.

    Raises:
      ConfigError: the config cannot be run on this machine.
      CheckpointError: the last step has no checkpoint, or one that cannot be read.
      DataError: the dataset is absent or damaged.
      WaitError: the disk does not answer.
    """
    job = job_lib.prepare(config)
    with workdir_lib.read_checkpoints(workdir) as checkpoints:
        steps, total = checkpoints.steps(), config_lib.steps(config)[1]
        if not steps or steps[-1] != total:
            raise CheckpointError(
                f"{workdir} has no checkpoint of step {total}, its last. Train it "
                "again: train.main with the same config and --workdir takes the steps "
                "after the last checkpoint that is there."
            )
        state, _ = checkpoints.restore(steps[-1], job.abstract)
    return job, state, data.first_batch(job.dataset, config.batch_size, config.seed)
