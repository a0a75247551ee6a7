"""The training loop: steps, an evaluation and a checkpoint each epoch, resumption."""

import math
from pathlib import Path

import jax
from ml_collections import ConfigDict

from train import config as config_lib
from train import data, optim
from train import mesh as mesh_lib
from train import step as step_lib
from train.checkpoint import Checkpoints
from train.files import write_atomically
from train.interrupts import Interrupted, Interrupts
from train.meter import Meter
from train.records import Records, Row
from train.terminal import Terminal


def run(config: ConfigDict, workdir: Path, terminal: Terminal) -> list[Row]:
    """Trains a model, from the start or from the last checkpoint in `workdir`.

    A run that is stopped and started again ends with the metrics of one that is not:
    parameters, optimiser, step, place in the data, random state and the sums of the
    epoch under way are all in the checkpoint.

    Args:
      config: what to train.
      workdir: where `config.json`, `metrics.csv`, `tensorboard/` and `checkpoints/` go.
      terminal: where progress is shown.

    Returns:
      The rows of `metrics.csv`.

    Raises:
      ConfigError: the config cannot be run, or the workdir holds a run of another.
      Interrupted: SIGTERM or SIGINT came; the state is saved.
    """
    mesh = mesh_lib.create()
    config_lib.validate(config, mesh.size)
    replicated, sharded = mesh_lib.replicated(mesh), mesh_lib.batch_sharded(mesh)
    steps_per_epoch, total_steps = config_lib.steps(config)
    learning_rate = optim.schedule(config, steps_per_epoch, total_steps)
    dataset = data.load(config.dataset, config.data_dir, config.image_size)
    batches = data.training_batches(dataset, config.batch_size, config.seed)
    meter = Meter()
    _claim(workdir, config)

    train_step = mesh_lib.parallel(step_lib.train_step(config), mesh, donate_state=True)
    evaluation_step = mesh_lib.parallel(step_lib.evaluation_step(config), mesh)

    def evaluate(state: step_lib.State) -> Meter:
        test = Meter(may_diverge=True)  # from which training can still recover
        for batch in data.evaluation_batches(dataset, config.batch_size):
            test.add(done, evaluation_step(state, jax.device_put(batch, sharded)))
        test.finish()
        return test

    with (
        Interrupts() as interrupts,
        Checkpoints(workdir / "checkpoints") as checkpoints,
    ):
        done = checkpoints.latest_step() or 0
        if done:
            abstract = jax.eval_shape(lambda: step_lib.initial_state(config))
            state, position = checkpoints.restore(done, abstract, replicated)
            batches.set_state(position["data"])
            meter.restore(position["meter"])
            terminal.say(f"{workdir}: goes on after step {done} of {total_steps}.")
        else:
            state = step_lib.initialise(config, replicated)

        def save() -> None:
            position = {"data": batches.get_state(), "meter": meter.state()}
            checkpoints.save(done, state, position)

        bar = terminal.start(workdir.name, done, total_steps)
        with Records(workdir, done) as records, bar:
            while done < total_steps:
                state, sums = train_step(state, jax.device_put(next(batches), sharded))
                done += 1
                meter.add(done, sums)
                bar.update(done, meter.loss, meter.accuracy, meter.rate)
                if done % steps_per_epoch == 0 or done == total_steps:
                    meter.finish()
                    row: Row = {
                        "step": done,
                        "epoch": math.ceil(done / steps_per_epoch),
                        "learning_rate": float(learning_rate(done - 1)),
                        "train_loss": meter.loss,
                        "train_accuracy": meter.accuracy,
                        "images_per_second": round(meter.rate, 1),
                    }
                    test = evaluate(state)
                    row |= {"test_loss": test.loss, "test_accuracy": test.accuracy}
                    records.append(row)
                    bar.say(_line(workdir.name, row))
                    meter.reset()
                    save()
                if interrupts.signum is not None:
                    save()
                    raise Interrupted(interrupts.signum, done)
    return records.rows


def _claim(workdir: Path, config: ConfigDict) -> None:
    """Writes the config into the workdir, or checks that it is the one there.

    Raises:
      ConfigError: the workdir holds a run of another config, or cannot be written.
    """
    path, text = workdir / "config.json", config_lib.to_json(config)
    if path.exists():
        if changed := config_lib.differences(path.read_text(), text):
            raise config_lib.ConfigError(
                f"{workdir} holds a run of another config. Take another --workdir, or "
                "delete it to start over. Changed:\n  " + "\n  ".join(changed)
            )
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    except OSError as error:
        raise config_lib.ConfigError(f"Cannot write to {workdir}: {error}") from error


def _line(name: str, row: Row) -> str:
    return (
        f"{name}  epoch {row['epoch']}  step {row['step']}  "
        f"train loss {row['train_loss']:.3f} accuracy {row['train_accuracy']:.1%}  "
        f"test loss {row['test_loss']:.3f} accuracy {row['test_accuracy']:.1%}  "
        f"{row['images_per_second']:,.0f} images/s"
    )
