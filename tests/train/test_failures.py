"""What a run leaves behind when it cannot go on."""

import json
import os
import resource
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from tests import xla_flags
from tests.data import write_tiny_datasets as tiny
from tests.train import commands
from train import data
from train.runs import lock

# None of this is about the model; an epoch of 179 steps takes about a second.
_SMALL = (
    "--config=configs/digits_vit.py",
    "--config.memory=baseline",
    "--config.batch_size=8",
    "--config.num_epochs=2",
)
_EPOCH, _ALL = 179, 358
# What is trained does not matter here: compiled in less time, as in other tests.
_QUICK = {"XLA_FLAGS": xla_flags.devices(1)}


class FailuresTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.directory = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.whole = cls.directory / "whole"
        status, _, errors = cls._train(cls.whole)
        assert (status, errors) == (0, "")

    @classmethod
    def _train(cls, workdir, *more):
        flag = f"--workdir={workdir}"
        return commands.run("train.main", *_SMALL, flag, *more, variables=_QUICK)

    def _copy(self, name):
        """The run, as if it had been stopped before its last row was written."""
        workdir = self.directory / name
        shutil.copytree(self.whole, workdir)
        return workdir

    def test_a_half_written_checkpoint_is_skipped(self):
        workdir = self._copy("half")
        whole = workdir / "checkpoints" / str(_ALL)
        whole.rename(workdir / "checkpoints" / f"{_ALL}.orbax-checkpoint-tmp")
        (workdir / "metrics.csv").unlink()
        shutil.copy(self.whole / "metrics.csv", workdir)
        status, out, errors = self._train(workdir)
        self.assertEqual((status, errors), (0, ""))
        self.assertRegex(out, rf"{_ALL}.*was not written to its end")
        self.assertIn(f"goes on after step {_EPOCH} of {_ALL}", out)
        self.assertEqual(commands.metrics(workdir), commands.metrics(self.whole))

    def test_a_damaged_checkpoint_is_put_aside(self):
        workdir = self._copy("damaged")
        newest = workdir / "checkpoints" / str(_ALL) / "state"
        for path in newest.rglob("*"):
            if path.is_file():
                os.truncate(path, path.stat().st_size // 2)
        status, out, errors = self._train(workdir)
        self.assertEqual((status, errors), (0, ""))
        self.assertIn(f"goes on after step {_EPOCH} of {_ALL}", out)
        self.assertEqual(commands.metrics(workdir), commands.metrics(self.whole))
        self.assertEqual(commands.steps(workdir), commands.steps(self.whole))

    def test_a_checkpoint_of_the_first_version_knows_its_step(self):
        """Its checksums do not, but its state does."""
        workdir = self._copy("renamed")
        renamed = workdir / "checkpoints" / "999"
        (workdir / "checkpoints" / str(_ALL)).rename(renamed)
        file = renamed / "checksums.json"
        file.write_text(json.dumps(json.loads(file.read_text())["files"]))
        status, out, errors = self._train(workdir)
        self.assertEqual((status, errors), (0, ""))
        self.assertIn(f"step 999 is damaged (its state is that of step {_ALL})", out)
        self.assertIn(f"goes on after step {_EPOCH} of {_ALL}", out)
        self.assertEqual(commands.metrics(workdir), commands.metrics(self.whole))

    @parameterized.parameters(
        (2000, "error: A checkpoint cannot be written"),
        (100, "metrics.csv: [Errno 27] File too large\n"),
    )
    def test_a_full_disk_costs_no_checkpoint(self, limit, message):
        workdir = self.directory / f"full_{limit}"
        flags = (*_SMALL, f"--workdir={workdir}")
        process = commands.start("train.main", *flags, variables=_QUICK)
        commands.wait_for(lambda: commands.steps(workdir), process)
        # No file may grow from here on: as good as a full disk.
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
        _, errors = process.communicate()
        self.assertEqual(process.returncode, 2, errors)
        self.assertIn(message, errors)
        self.assertLen(errors.splitlines(), 1)  # no library's lines around it
        self.assertEqual(commands.steps(workdir), [_EPOCH])
        status, out, errors = self._train(workdir)
        self.assertEqual((status, errors), (0, ""))
        self.assertIn(f"goes on after step {_EPOCH} of {_ALL}", out)
        self.assertEqual(commands.metrics(workdir), commands.metrics(self.whole))

    def test_another_dataset_in_the_same_place_is_noticed(self):
        data_dir = self.directory / "data"
        tiny.write(data_dir)
        flags = (
            "--config.dataset=cifar10",
            f"--config.data_dir={data_dir}",
            "--config.image_size=32",
            "--config.model.patch_size=8",
            "--config.num_epochs=1",
        )
        workdir = self.directory / "moved"
        status, _, errors = self._train(workdir, *flags)
        self.assertEqual((status, errors), (0, ""))
        shutil.rmtree(data_dir)
        with mock.patch.dict(tiny.EXAMPLES, train=40):
            tiny.write(data_dir)
        status, _, errors = self._train(workdir, *flags)
        self.assertEqual(status, 2)
        self.assertIn("began with 48 training examples of 'cifar10'", errors)
        self.assertNotIn("Traceback", errors)

    def test_another_run_in_the_same_place_is_named(self):
        workdir = self._copy("held")
        with lock.locked(workdir, print):
            status, _, errors = self._train(workdir, "--config.seed=7")
        self.assertEqual(status, 2)
        self.assertIn(f"is being written by process {os.getpid()} on ", errors)
        self.assertLen(errors.splitlines(), 1)

    @parameterized.parameters(
        "[]", "{" * 100_000, "a,b\n1,2\n", "step\n" + "9" * 200_000
    )
    def test_metrics_that_are_damaged_are_told_with_the_way_out(self, content):
        workdir = self._copy(f"metrics_{len(content)}")
        whole = (workdir / "metrics.csv").read_bytes()
        (workdir / "metrics.csv").write_text(content)
        status, _, errors = self._train(workdir)
        if "\n" in content:
            self.assertEqual(status, 2)
            self.assertRegex(errors, r"metrics.csv cannot be read: .* Delete it: ")
            self.assertLess(len(errors), 500)
            (workdir / "metrics.csv").unlink()
            status, _, errors = self._train(workdir)
        self.assertEqual((status, errors), (0, ""))
        self.assertEqual((workdir / "metrics.csv").read_bytes(), whole)

    def test_a_workdir_that_cannot_be_written_is_told_first(self):
        file = self.directory / "file"
        file.touch()
        status, out, errors = self._train(file / "workdir")
        self.assertEqual(status, 2)
        self.assertIn(str(file), errors)
        self.assertNotIn("Traceback", errors)
        self.assertNotIn("epoch", out)

    def test_an_explosion_in_the_last_update_is_no_success(self):
        workdir = self.directory / "exploded"
        steep = (
            "--config.optimizer.learning_rate=1e38",
            "--config.schedule.warmup_epochs=0",
            "--config.num_steps=1",
        )
        status, _, errors = self._train(workdir, *steep)
        self.assertEqual(status, 2)
        self.assertRegex(errors, "(test loss became|infinite, NaN).* at step 1")
        self.assertNotIn("Traceback", errors)
        self.assertEqual(commands.steps(workdir), [])
        self.assertFalse((workdir / "metrics.csv").exists())
        self.assertTrue((workdir / "failure" / "batch-1-process-0.npz").exists())

    def test_a_loss_that_is_not_finite_leaves_what_shows_it_again(self):
        workdir = self.directory / "diverged"
        steep = (
            "--config.optimizer.learning_rate=1e14",
            "--config.schedule.warmup_epochs=0",
            "--config.checkpoint_steps=1",
        )
        messages = []
        for _ in range(2):
            status, out, errors = self._train(workdir, *steep)
            self.assertEqual(status, 2)
            self.assertNotIn("Traceback", errors)
            messages.append(errors)
        self.assertEqual(*messages)  # the second run went on from a checkpoint
        self.assertIn("goes on after step", out)
        self.assertIn("ended before with a loss that was not finite", out)
        record = json.loads((workdir / "failure" / "failure.json").read_text())
        step = record["step"]
        self.assertIn(f"at step {step}.", messages[0])
        self.assertEqual(record["checkpoint"], commands.steps(workdir)[-1])
        self.assertLess(record["checkpoint"], step)
        self.assertEqual(record["config"]["optimizer"]["learning_rate"], 1e14)
        config = record["config"]
        dataset = data.load("digits", "", config["image_size"], config["augmentation"])
        batches = data.training_batches(dataset, config["batch_size"], config["seed"])
        expected = [next(batches) for _ in range(step)][-1]
        with np.load(workdir / "failure" / f"batch-{step}-process-0.npz") as saved:
            np.testing.assert_array_equal(saved["image"], expected["image"])
            np.testing.assert_array_equal(saved["label"], expected["label"])

    @parameterized.parameters(
        (["--config.init_from=ViT-B_16.npz"], "imagenet21k/ViT-B_16.npz"),
        (["--config.dataset=cifar10", "--config.data_dir=/nowhere"], "train.prepare"),
        (["--config.mesh.fsdp=3"], "are asked for, and there are 1"),
    )
    def test_what_cannot_be_run_is_told_and_leaves_no_claim(self, arguments, message):
        workdir = self.directory / "refused"
        status, out, errors = self._train(workdir, *arguments)
        self.assertEqual(status, 2)
        self.assertIn(message, errors)
        self.assertNotIn("Traceback", out + errors)
        self.assertFalse((workdir / "config.json").exists())


if __name__ == "__main__":
    absltest.main()
