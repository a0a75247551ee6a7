"""Commands that read a run: evaluating it, exporting its weights."""

import math
import tempfile
from pathlib import Path
from unittest import mock

import chex
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from absl import flags
from absl.testing import absltest, parameterized
from flax import traverse_util

from tests.train import commands
from train import data, evaluate, models
from train.config import config as config_lib
from train.system.disk import CheckpointError

# None of this is about memory.
_SMALL = (
    *commands.TINY,
    "--config.memory=baseline",
    "--config.dtype=bfloat16",
)
_RUN = (
    "--config.num_epochs=2",
    "--config.ema_decay=0.9",
    "--config.mixup=0.2",
    "--config.label_smoothing=0.1",
    "--config.accumulate_steps=2",
    "--config.profile_steps=(3,5)",
)


def _logits(path, dtype):
    """Logits of the test images, of a plain Flax model with exported weights."""
    variables = traverse_util.unflatten_dict(safetensors.numpy.load_file(path), sep="/")
    info = data.info("digits")
    dataset = data.load("digits", "", 8, "none")
    (batch,) = data.evaluation_batches(dataset, info.test_examples)
    images = (batch["image"] - np.float32(info.mean)) / np.float32(info.std)
    with mock.patch.dict(models._MODELS, commands.SMALL_RESNET):
        model = models.create("resnet18", 10, dtype, width=4, stem="cifar")
    return model.apply(variables, images, train=False), batch["label"]


class AfterTrainingTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.directory = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.workdir = cls.directory / "run"
        arguments = (*_SMALL, *_RUN, f"--workdir={cls.workdir}")
        status, _, errors = commands.run("train.main", *arguments, small=True)
        assert (status, errors) == (0, ""), errors
        cls.rows = commands.metrics(cls.workdir)

    def _best(self):
        return max(self.rows, key=lambda row: (row["test_accuracy"], row["step"]))

    def test_chosen_steps_are_traced(self):
        traces = list((self.workdir / "profile").rglob("*.xplane.pb"))
        self.assertLen(traces, 1)
        self.assertGreater(traces[0].stat().st_size, 0)

    @parameterized.parameters(("best", 1), ("last", 3), ("number", 1))
    def test_evaluates_as_in_training(self, which, devices):
        row = self._best() if which == "best" else self.rows[-1]
        step = str(row["step"]) if which == "number" else which
        before = sorted(self.workdir.rglob("*"))
        status, out, errors = commands.run(
            "train.evaluate",
            f"--workdir={self.workdir}",
            f"--step={step}",
            devices=devices,
            small=True,
        )
        self.assertEqual((status, errors), (0, ""))
        if devices == 1:  # else the batch is another one, and rounds in another order
            self.assertIn(f"test loss {row['test_loss']:.4f}", out)
        self.assertIn(f"step {row['step']}  test loss", out)
        self.assertIn(f"  accuracy {row['test_accuracy']:.2%}", out)
        self.assertIn("of 360 images", out)
        self.assertEqual(sorted(self.workdir.rglob("*")), before)

    def test_plain_flax_takes_exported_weights(self):
        path = self.directory / "weights.safetensors"
        status, _, errors = commands.run(
            "train.export",
            f"--workdir={self.workdir}",
            f"--output={path}",
            small=True,
        )
        self.assertEqual((status, errors), (0, ""))
        logits, labels = _logits(path, "bfloat16")
        chex.assert_type(logits, jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        accuracy = np.mean(np.argmax(logits, axis=-1) == labels)
        # What the step on a larger batch rounds is rounded in another order here.
        row = self._best()
        self.assertAlmostEqual(float(losses.mean()), row["test_loss"], delta=0.02)
        self.assertAlmostEqual(float(accuracy), row["test_accuracy"], delta=0.01)
        with safetensors.safe_open(path, "numpy") as file:
            metadata = file.metadata()
        self.assertEqual(metadata["step"], str(row["step"]))
        config = config_lib.from_json(metadata["config"])
        self.assertEqual(config.model.width, 4)

    def test_exported_weights_start_another_run(self):
        path = self.directory / "first.safetensors"
        flags = (f"--workdir={self.workdir}", f"--output={path}", "--step=last")
        self.assertEqual(commands.run("train.export", *flags, small=True)[0], 0)
        workdir = self.directory / "second"
        status, _, errors = commands.run(
            "train.main",
            *_SMALL,
            f"--workdir={workdir}",
            f"--config.init_from={path}",
            "--config.num_steps=1",
            "--config.optimizer.learning_rate=1e-9",
            small=True,
        )
        self.assertEqual((status, errors), (0, ""))
        (row,) = commands.metrics(workdir)
        self.assertAlmostEqual(
            row["test_accuracy"], self.rows[-1]["test_accuracy"], delta=0.05
        )

    def test_a_test_loss_that_is_not_finite_is_no_result(self):
        """Where weights are finite, and what is computed with them is not."""

        def evaluator(job):
            del job
            return lambda state: mock.Mock(loss=math.inf)

        flags.FLAGS.mark_as_parsed()
        with (
            mock.patch.dict(models._MODELS, commands.SMALL_RESNET),
            mock.patch.object(evaluate, "evaluator", evaluator),
            pytest.raises(CheckpointError, match="has a test loss of inf: take anoth"),
        ):
            evaluate.main(self.workdir)

    @parameterized.parameters(
        ("train.evaluate", ["--step=7"], "has best, last and"),
        ("train.evaluate", [f"--step={'1' * 5000}"], "has best, last and"),
        ("train.evaluate", ["--workdir=nothing"], "nothing holds no run"),
        ("train.evaluate", ["--workdir="], "--workdir= is empty"),
        ("train.evaluate", ["--num_processes=2"], "Unknown command line flag"),
        ("train.export", ["--output=weights.npz"], "must end in .safetensors"),
        ("train.export", [], "--output= is missing"),
    )
    def test_errors_are_told_in_a_line(self, command, arguments, message):
        status, out, errors = commands.run(
            command, f"--workdir={self.workdir}", *arguments
        )
        self.assertEqual(status, 2)
        self.assertIn(message, errors)
        self.assertNotIn("Traceback", out + errors)


if __name__ == "__main__":
    absltest.main()
