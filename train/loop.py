"""The training loop: steps, evaluations, checkpoints, resumption."""

import contextlib
import dataclasses
import math
import signal
from pathlib import Path
from typing import Any, NoReturn

import jax
from ml_collections import ConfigDict

from train import data
from train.config import config as config_lib
from train.config import validation
from train.engine import finite, initialisation, optim
from train.engine import job as job_lib
from train.engine import mesh as mesh_lib
from train.engine import step as step_lib
from train.engine.evaluator import evaluator
from train.engine.job import Job
from train.engine.meter import Meter, NonFiniteLossError
from train.engine.prefetch import Prefetch
from train.engine.profiler import Profiler
from train.processes import collective
from train.processes.interrupts import Interrupted, Interrupts, StopRequested
from train.runs import failure
from train.runs import position as position_lib
from train.runs import workdir as workdir_lib
from train.runs.checkpoints import Checkpoints
from train.runs.position import Position
from train.runs.records import Records, Row
from train.system.disk import check_writable
from train.system.terminal import Terminal


def run(config: ConfigDict, workdir: Path, terminal: Terminal) -> list[Row]:
    """Trains a model, from the start or from the last checkpoint in `workdir`.

    An interrupted and resumed run has the same losses and accuracies as an
    uninterrupted one. A checkpoint has the parameters, the optimiser's state, the step
    (which determines the position in the data), the random state and the sums of the
    current epoch.

    Args:
      config: the config to train.
      workdir: the directory for `config.json`, `metrics.csv`, `tensorboard/` and
        `checkpoints/`; all processes of a run need the same one.
      terminal: shows the progress.

    Returns:
      The rows of `metrics.csv`.

    Raises:
      ConfigError: the config cannot be run, or the workdir has a run of another config.
      LockedError: another run writes to the workdir.
      CheckpointError: a checkpoint cannot be written or read.
      DataError: the dataset is missing or damaged.
      WeightsError: `config.init_from` does not fit the model.
      NonFiniteLossError: the loss, an array of a state to save, or the last test loss
        became infinite or NaN; `failure/` is written.
      RecordsError: metrics cannot be written.
      Interrupted: SIGTERM, SIGINT or SIGHUP came; the state is saved.
      WaitError: a batch or the last checkpoint could not be read in time.
    """
    if config.get("num_steps") is not None and config.get("num_epochs") is not None:
        terminal.say(
            f"config.num_steps={config.num_steps} says how long to train, not "
            f"config.num_epochs={config.num_epochs}."
        )
    config = config_lib.without_unused_epochs(config)
    job = job_lib.prepare(config)
    validation.check_worker_count(config)
    with workdir_lib.created_and_locked(workdir, terminal.say):
        workdir_lib.check_can_start(workdir, config)
        check_writable(workdir / "checkpoints", job.state_bytes)
        with Checkpoints(
            workdir / "checkpoints", terminal.say, problem=_problem
        ) as checkpoints:
            try:
                return _train(job, workdir, terminal, checkpoints)
            except NonFiniteLossError as error:
                last = max(checkpoints.steps(), default=0)
                terminal.say(failure.write(workdir, job, error, last))
                raise


def _train(
    job: Job, workdir: Path, terminal: Terminal, checkpoints: Checkpoints
) -> list[Row]:
    config = job.config
    steps_per_epoch, total_steps = config_lib.steps(config)
    evaluate_every = max(1, round(config.evaluate_every * steps_per_epoch))
    learning_rate = optim.values(optim.schedule(config, steps_per_epoch, total_steps))
    train_step = mesh_lib.compile_training(
        step_lib.train_step(config), job.mesh, job.shardings
    )
    evaluate = evaluator(job)

    meter = Meter()
    done, state, rows = _beginning(job, checkpoints, meter)
    if done:
        terminal.say(f"{workdir}: goes on after step {done} of {total_steps}.")
    if failure.has_failed(workdir):
        terminal.say(failure.advice(workdir))
    workdir_lib.write_config(workdir, config)

    saver = _Saver(checkpoints, meter, len(job.dataset.train), total_steps)
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        interrupts = enter(Interrupts(several=jax.process_count() > 1))
        batches = enter(_batches(job, done, interrupts))
        records = enter(
            Records(workdir, done, rows, terminal.say, write=collective.is_first())
        )
        profiler = enter(Profiler(config.profile_steps, workdir / "profile"))
        bar = enter(terminal.start(workdir.name, done, total_steps))
        while done < total_steps:
            profiler.before(done, state)
            try:
                batch = next(batches)
            except StopRequested as request:
                saver.stop(request.signum, done, state, records.rows)
            state, sums = train_step(state, batch)
            done += 1
            profiler.after(done, state)
            meter.add(done, sums)
            bar.update(done, meter.loss, meter.accuracy, meter.rate)
            if done % evaluate_every == 0 or done == total_steps:
                meter.finish()
                # Before the evaluation, so that the rate has the steps' time alone.
                row = {
                    "step": done,
                    "epoch": math.ceil(done / steps_per_epoch),
                    "learning_rate": learning_rate(done - 1),
                } | _measured(meter, batches.take_waited())
                test = evaluate(state)
                row |= _tested(test)
                bar.say(_line(workdir.name, row))
                meter.reset()
                saver.save(done, state, [*records.rows, row], test)
                if not records.rows:
                    # `workdir.check_can_start` takes rows for a sign of a checkpoint.
                    checkpoints.wait()
                records.append(row)
            elif config.checkpoint_steps and done % config.checkpoint_steps == 0:
                saver.save(done, state, records.rows)
            if collective.must_stop(done):
                interrupts.signum = interrupts.handed_on or signal.SIGTERM
            if interrupts.signum is not None:
                saver.stop(interrupts.signum, done, state, records.rows)
    return records.rows


@dataclasses.dataclass(frozen=True)
class _Saver:
    """Saves the state after a step, if it is finite.

    Attributes:
      checkpoints: saves the states.
      meter: has the sums of the current epoch.
      train_examples: the number of training examples.
      total_steps: the number of steps of the run.
    """

    checkpoints: Checkpoints
    meter: Meter
    train_examples: int
    total_steps: int

    def save(
        self,
        done: int,
        state: step_lib.State,
        rows: list[Row],
        test: Meter | None = None,
    ) -> None:
        """Saves the state, and the rows of `metrics.csv` so far.

        Args:
          done: the number of steps done.
          state: the state after them.
          rows: the rows.
          test: the evaluation of the state; `None`: not evaluated.

        Raises:
          NonFiniteLossError: the loss of a step or the state is not finite, or, after
            the last step, the test loss.
          CheckpointError: as `Checkpoints.save`.
        """
        # First the sums of pending steps: their losses may not be finite.
        position = Position(self.meter.state(), self.train_examples, rows)
        problem = finite.problem(state)
        if test is not None and not math.isfinite(test.loss):
            if done == self.total_steps:
                problem = problem or f"The test loss became {test.loss}"
            test = None  # training can still recover; this state is not the best
        if problem:
            raise NonFiniteLossError(done, math.nan, problem)
        accuracy = None if test is None else test.accuracy
        self.checkpoints.save(done, state, position.to_json(), accuracy)

    def stop(
        self, signum: int, done: int, state: step_lib.State, rows: list[Row]
    ) -> NoReturn:
        """Saves the state, and ends the run because of a signal.

        Raises:
          Interrupted: the state is saved, or no step was done.
          NonFiniteLossError: as `save`.
          CheckpointError: as `save`.
        """
        if done:
            self.save(done, state, rows)
            self.checkpoints.wait()
        raise Interrupted(signum, done, self.total_steps)


def _beginning(
    job: Job, checkpoints: Checkpoints, meter: Meter
) -> tuple[int, step_lib.State, list[Row]]:
    """Returns the number of steps done, the state and the rows; sets the meter.

    All of these are from the last checkpoint, or those of a new run if there is none.
    """
    restored = checkpoints.restore_latest(job.abstract)
    if restored is None:
        return 0, initialisation.initial_state(job), []
    done, state, content = restored
    position = Position.from_json(content)
    _check_data(job, position)
    meter.restore(position.meter)
    return done, state, position.rows


def _measured(meter: Meter, waited: float) -> Row:
    """Returns the columns of the steps since the last row.

    Args:
      meter: the sums of these steps.
      waited: the seconds of waiting for data.
    """
    return {
        "train_loss": meter.loss,
        "train_accuracy": meter.accuracy,
        "images_per_second": round(meter.rate, 1),
        "data_wait": round(waited / meter.seconds, 4),
    }


def _tested(test: Meter) -> Row:
    """Returns the columns of an evaluation."""
    return {
        "test_loss": test.loss,
        "test_accuracy": test.accuracy,
        "test_top5_accuracy": test.top5_accuracy,
    }


def _problem(step: int, state: step_lib.State, position: Any) -> str:
    """Returns why training cannot resume from a checkpoint; "" if it can."""
    return step_lib.problem(step, state) or position_lib.problem(position)


def _check_data(job: Job, position: Position) -> None:
    """Checks that the dataset has as many examples as at the start of the run.

    Raises:
      ConfigError: it has another number of examples.
    """
    before, now = position.train_examples, len(job.dataset.train)
    if before != now:
        raise config_lib.ConfigError(
            f"The run began with {before} training examples of "
            f"{job.config.dataset!r}, and config.data_dir={job.config.data_dir!r} has "
            f"{now}: name the directory that it began with."
        )


def _batches(job: Job, start: int, interrupts: Interrupts) -> Prefetch:
    def check() -> None:
        data.check_workers_alive()
        interrupts.check()

    batches = data.training_batches(
        job.dataset,
        job.config.batch_size,
        job.config.seed,
        start=start,
        workers=job.config.workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return Prefetch(batches, mesh_lib.placer(job.mesh), check)


def _line(name: str, row: Row) -> str:
    return (
        f"{name}  epoch {row['epoch']}  step {row['step']}  "
        f"train loss {row['train_loss']:.3f} accuracy {row['train_accuracy']:.1%}  "
        f"test loss {row['test_loss']:.3f} accuracy {row['test_accuracy']:.1%}  "
        f"{row['images_per_second']:,.0f} images/s  "
        f"waited for data {row['data_wait']:.1%}"
    )
