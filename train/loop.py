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

    A run that is stopped and started again ends with the metrics of one that is not:
    parameters, optimiser, step (which is also the place in the data), random state and
    the sums of the epoch under way are all in the checkpoint.

    Args:
      config: what to train.
      workdir: where `config.json`, `metrics.csv`, `tensorboard/` and `checkpoints/` go;
        of several processes, the same directory for all.
      terminal: where progress is shown.

    Returns:
      The rows of `metrics.csv`.

    Raises:
      ConfigError: the config cannot be run, or the workdir holds a run of another.
      LockedError: another run writes to the workdir.
      CheckpointError: a checkpoint cannot be written or read.
      DataError: the dataset is not there, or damaged.
      WeightsError: `config.init_from` does not fit the model.
      NonFiniteLossError: the loss, or an array of the state that is to be saved,
        became infinite or NaN; `failure/` is written.
      RecordsError: metrics cannot be written.
      Interrupted: SIGTERM, SIGINT or SIGHUP came; the state is saved.
      WaitError: the next batch did not come in half an hour.
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
                # Before the evaluation, whose time is not that of the steps.
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
    """Saves the state after a step, if it is fit to go on from.

    Attributes:
      checkpoints: where it goes.
      meter: has the sums of the epoch under way.
      train_examples: how many there are.
      total_steps: of the whole run.
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
        """Saves the state, and the rows up to it.

        Raises:
          NonFiniteLossError: the state is not finite, or the test loss after the last
            step.
        """
        # First what the steps before say, which may not have been looked at.
        position = Position(self.meter.state(), self.train_examples, rows)
        problem = finite.problem(state)
        if test is not None and not math.isfinite(test.loss):
            if done == self.total_steps:
                problem = problem or f"The test loss became {test.loss}"
            test = None  # training can still recover, but the best this is not
        if problem:
            raise NonFiniteLossError(done, math.nan, problem)
        accuracy = None if test is None else test.accuracy
        self.checkpoints.save(done, state, position.to_json(), accuracy)

    def stop(
        self, signum: int, done: int, state: step_lib.State, rows: list[Row]
    ) -> NoReturn:
        """Saves the state and ends the run, as a signal asked."""
        if done:
            self.save(done, state, rows)
            self.checkpoints.wait()
        raise Interrupted(signum, done, self.total_steps)


def _beginning(
    job: Job, checkpoints: Checkpoints, meter: Meter
) -> tuple[int, step_lib.State, list[Row]]:
    """The steps done, the state and the rows to go on from; the meter is set."""
    restored = checkpoints.restore_latest(job.abstract)
    if restored is None:
        return 0, initialisation.initial_state(job), []
    done, state, content = restored
    position = Position.from_json(content)
    _check_data(job, position)
    meter.restore(position.meter)
    return done, state, position.rows


def _measured(meter: Meter, waited: float) -> Row:
    """The columns of the steps since the last row; `waited` for data, in seconds."""
    return {
        "train_loss": meter.loss,
        "train_accuracy": meter.accuracy,
        "images_per_second": round(meter.rate, 1),
        "data_wait": round(waited / meter.seconds, 4),
    }


def _tested(test: Meter) -> Row:
    """The columns of an evaluation."""
    return {
        "test_loss": test.loss,
        "test_accuracy": test.accuracy,
        "test_top5_accuracy": test.top5_accuracy,
    }


def _problem(step: int, state: step_lib.State, position: Any) -> str:
    """Returns why a checkpoint is none to go on from; empty if it is one."""
    return step_lib.problem(step, state) or position_lib.problem(position)


def _check_data(job: Job, position: Position) -> None:
    """Checks that the dataset is that of the checkpoint, wherever it lies.

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
