import json
import os
import shutil
import signal
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from configs import digits_vit
from tests.train import commands
from train import loop
from train.engine import evaluator, meter
from train.processes import interrupts
from train.runs import records
from train.system import terminal

_EPOCHS = 6
_STEPS_PER_EPOCH = 1437 // 32


def _config(workdir):
    return json.loads((workdir / "config.json").read_text())


def _train(workdir, *more, **kwargs):
    arguments = (*commands.TINY, f"--workdir={workdir}", *more)
    return commands.run("train.main", *arguments, small=True, **kwargs)


class LoopTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.directory = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.whole = cls.directory / "whole"
        # A run that never came to a checkpoint may be another one.
        cls.whole.mkdir()
        (cls.whole / "config.json").write_text('{"dataset": "cifar10"}')
        cls.result = _train(cls.whole)

    def test_a_run_leaves_metrics_config_events_and_checkpoints(self):
        status, out, errors = self.result
        self.assertEqual((status, errors), (0, ""))
        lines = [line for line in out.splitlines() if "epoch" in line]
        self.assertLen(lines, _EPOCHS)
        rows = commands.metrics(self.whole)
        self.assertEqual([row["epoch"] for row in rows], list(range(1, _EPOCHS + 1)))
        self.assertEqual(rows[-1]["step"], _EPOCHS * _STEPS_PER_EPOCH)
        self.assertLess(rows[-1]["train_loss"], rows[0]["train_loss"])
        self.assertGreater(rows[-1]["test_accuracy"], 0.5)
        config = _config(self.whole)
        self.assertEqual(
            config["model"], {"name": "resnet18", "stem": "cifar", "width": 4}
        )
        self.assertEqual((config["memory"], config["remat"]), ("dropit", "none"))
        self.assertEqual(config["dropit"]["rate"], "preset")
        self.assertNotEmpty(list((self.whole / "tensorboard").glob("events.*")))

    def test_the_last_two_checkpoints_and_the_best_are_kept(self):
        rows = commands.metrics(self.whole)
        best = max(rows, key=lambda row: (row["test_accuracy"], row["step"]))
        kept = {best["step"], *(row["step"] for row in rows[-2:])}
        self.assertEqual(commands.steps(self.whole), sorted(kept))

    def test_the_wait_for_data_is_told(self):
        _, out, _ = self.result
        self.assertRegex(out, r"epoch 6 .* waited for data \d+\.\d%")
        shares = [row["data_wait"] for row in records.read(self.whole / "metrics.csv")]
        self.assertLen([share for share in shares if 0 <= share < 1], _EPOCHS)

    def test_a_run_without_a_checkpoint_may_change(self):
        self.assertEqual(_config(self.whole)["dataset"], "digits")

    def test_signals_cost_nothing_but_time(self):
        """One after the other, each on the run that the one before has stopped."""
        workdir, saved = self.directory / "stopped", 0
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
            status, out, errors = self._stop_after(saved, workdir, signum)
            if saved:
                self.assertIn(f"goes on after step {saved} of", out)
            saved = commands.steps(workdir)[-1]
            self.assertLess(saved, _EPOCHS * _STEPS_PER_EPOCH)
            self.assertNotIn("Traceback", errors)
            if signum == signal.SIGKILL:
                self.assertEqual(status, -signum)
                continue
            # The step that ran is saved.
            self.assertEqual(status, 128 + signum)
            self.assertIn(f"Stopped by {signum.name} after step {saved}", errors)
        status, out, _ = _train(workdir)
        self.assertEqual(status, 0)
        self.assertIn(f"goes on after step {saved} of", out)
        self.assertEqual(commands.metrics(workdir), commands.metrics(self.whole))

    def _stop_after(self, step, workdir, signum, *more, **kwargs):
        """Starts a run and stops it once it has a checkpoint of a later step."""
        flags = (*commands.TINY, f"--workdir={workdir}", *more)
        process = commands.start("train.main", *flags, small=True, **kwargs)
        commands.wait_for(
            lambda: max(commands.steps(workdir), default=0) > step, process
        )
        process.send_signal(signum)
        out, errors = process.communicate()
        return process.returncode, out, errors

    def test_another_config_does_not_touch_the_run(self):
        before = (self.whole / "metrics.csv").read_bytes()
        changes = ("--config.dropit.rate=0.5", "--config.augmentation=shift")
        status, _, errors = _train(self.whole, *changes)
        self.assertEqual(status, 2)
        self.assertIn("config.dropit.rate: 'preset' -> 0.5", errors)
        self.assertIn("config.augmentation: 'none' -> 'shift'", errors)
        self.assertNotIn("Traceback", errors)
        self.assertEqual((self.whole / "metrics.csv").read_bytes(), before)

    def _copy(self, name):
        workdir = self.directory / name
        shutil.copytree(self.whole, workdir)
        return workdir

    def test_a_run_that_lost_its_checkpoints_is_left_alone(self):
        workdir = self._copy("lost")
        shutil.rmtree(workdir / "checkpoints")
        before = (workdir / "metrics.csv").read_bytes()
        status, _, errors = _train(workdir)
        self.assertEqual(status, 2)
        self.assertIn("holds the metrics of a run, and no checkpoint", errors)
        self.assertEqual((workdir / "metrics.csv").read_bytes(), before)
        self.assertFalse((workdir / "checkpoints").exists())

    def test_a_record_that_is_lost_is_restored(self):
        workdir = self._copy("unrecorded")
        before = (workdir / "metrics.csv").read_bytes()
        (workdir / "metrics.csv").unlink()
        status, out, errors = _train(workdir)
        self.assertEqual(status, 0)
        self.assertIn("lacks 6 of 6 rows", out + errors)
        self.assertEqual((workdir / "metrics.csv").read_bytes(), before)

    def test_a_finished_run_stays_as_it_is(self):
        """And what changes no result may change."""
        before = (self.whole / "metrics.csv").read_bytes()
        free = ("--config.workers=1", "--config.checkpoint_steps=7")
        status, out, errors = _train(self.whole, *free)
        self.assertEqual((status, errors), (0, ""))
        self.assertIn("after step 264 of 264", out)
        self.assertEqual((self.whole / "metrics.csv").read_bytes(), before)


class CommandTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.directory = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))

    def test_a_batch_that_devices_cannot_share_is_refused(self):
        workdir = self.directory / "uneven"
        status, _, errors = _train(workdir, devices=3)
        self.assertEqual(status, 2)
        self.assertIn("config.batch_size=32 cannot be split evenly over 3", errors)
        self.assertFalse(workdir.exists())

    def test_steps_and_a_step_schedule_on_the_command_line(self):
        workdir = self.directory / "steps"
        status, _, errors = commands.run(
            "train.main",
            f"--workdir={workdir}",
            "--config=configs/digits_vit.py",
            "--config.batch_size=32",
            "--config.optimizer.learning_rate=0.05",
            "--config.schedule.warmup_epochs=1",
            "--config.num_steps=50",
            "--config.schedule.name=step",
            "--config.schedule.decay_epochs=(1,)",
            "--config.dropit.chunk_size=None",
        )
        self.assertEqual((status, errors), (0, ""))
        rows = commands.metrics(workdir)
        self.assertEqual([row["step"] for row in rows], [44, 50])
        rates = [row["learning_rate"] for row in rows]
        np.testing.assert_allclose(rates, [0.05 * 43 / 44, 0.005], rtol=1e-5)
        self.assertIsNone(_config(workdir)["dropit"]["chunk_size"])

    @parameterized.parameters(
        (["--config.dropit.rat=0.5"], "config.dropit has chunk_size, encoding, fill, "),
        (["--config.modle.width=8"], "Did you mean config.model.width?"),
        (["--config.seed=a"], "invalid literal for int() with base 10: 'a'"),
        (["--config=configs/digits_resnet18.py:x"], "There is no variant 'x'"),
        (["--wrkdir=x"], "Did you mean: workdir ?"),
        (["--config.dropit.rate=2"], r"config.dropit: DropIT.rate must be in [0, 1)"),
        (["--config.model.name=resnet1"], "config.model.name: unknown value 'resnet1'"),
        (["--config=nothing.py"], "No such file or directory: 'nothing.py'"),
        (
            ["--config.seed=99999999999999999999"],
            "config.seed must be at most 4,294,967,295",
        ),
        (["stray"], "Unexpected argument: 'stray'"),
        (["--config.workers=1000000"], "config.workers=1000000 is more than"),
        (["--config.init_from=~nosuchuser/a.npz"], "is no name of a file"),
        (["--config.init_from=/nowhere.npz"], "/nowhere.npz does not exist"),
    )
    def test_a_wrong_command_is_told_in_a_line(self, arguments, message):
        """And leaves no directory behind."""
        workdir = self.directory / "wrong"
        status, out, errors = _train(workdir, *arguments)
        self.assertEqual(status, 2)
        self.assertIn(message, out + errors)
        self.assertNotIn("Traceback", out + errors)
        self.assertFalse(workdir.exists())

    @parameterized.parameters(
        ("return 1 / 0", "ZeroDivisionError: division by zero"),
        ("return get_config()", "the config file calls itself"),
        ("raise Exception('boom\\x1b[31m')", "Exception: boom\\x1b[31m"),
        ("assert False", "AssertionError"),
        ("return None", "config"),
        ("import nothing_like_it", "No module named 'nothing_like_it'"),
    )
    def test_a_config_file_that_fails_is_told_in_a_line(self, body, message):
        file = self.directory / "fails.py"
        file.write_text(f"def get_config():\n    {body}\n")
        flag = f"--config={file}"
        workdir = f"--workdir={self.directory / 'wrong'}"
        status, out, errors = commands.run("train.main", flag, workdir)
        self.assertEqual((status, out), (2, ""))
        self.assertIn(message, errors)
        self.assertLen(errors.splitlines(), 1)


class DevicesTest(absltest.TestCase):
    def test_several_share_a_batch_and_the_run_goes_on_with_fewer(self):
        """Restores a state on fewer devices than it was sharded over."""
        directory = Path(self.enterContext(tempfile.TemporaryDirectory()))
        one, several = directory / "one", directory / "several"
        self._train(one)
        self._train(several, "--config.mesh.fsdp=4", devices=4)
        self.assertEqual(_config(several)["dropit"]["rate"], "preset")
        self._assert_close(several, one)
        first, last = commands.steps(several)
        # As if it had been killed in the second epoch.
        shutil.rmtree(several / "checkpoints" / str(last))
        rows = (several / "metrics.csv").read_text().splitlines(keepends=True)
        (several / "metrics.csv").write_text("".join(rows[:-1]))
        out = self._train(several, devices=2)
        self.assertIn(f"goes on after step {first} of {last}", out)
        self._assert_close(several, one)

    def _train(self, workdir, *more, devices=1):
        status, out, errors = commands.run(
            "train.main",
            *commands.TINY,
            "--config.num_epochs=2",
            "--config.batch_size=360",
            f"--workdir={workdir}",
            *more,
            devices=devices,
            small=True,
        )
        self.assertEqual((status, errors), (0, ""))
        return out

    def _assert_close(self, workdir, expected):
        """Checks metrics: they are of the same sums in another order."""
        rows, others = commands.metrics(workdir), commands.metrics(expected)
        self.assertLen(rows, 2)
        for row, other in zip(rows, others, strict=True):
            np.testing.assert_allclose(
                list(row.values()), list(other.values()), rtol=1e-3
            )


class RowTest(absltest.TestCase):
    """Two steps in this process, and a signal in an evaluation that takes long."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        clock = [0.0]

        def monotonic():
            clock[0] += 1e-3
            return clock[0]

        def stopped(job):
            def evaluate(state):
                clock[0] += 1e9
                os.kill(os.getpid(), signal.SIGTERM)
                return fast(state)

            fast = evaluator.evaluator(job)
            return evaluate

        config = digits_vit.get_config()
        config.update(memory="baseline", num_epochs=1, batch_size=480)
        cls.workdir = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        with (
            mock.patch.object(meter.time, "monotonic", monotonic),
            mock.patch.object(loop, "evaluator", stopped),
            pytest.raises(interrupts.Interrupted) as cls.raised,
        ):
            loop.run(config, cls.workdir, terminal.Terminal())

    def test_a_signal_after_the_last_step_ends_a_run_that_is_done(self):
        """And its rates are of the steps, and not of the evaluation."""
        (row,) = records.read(self.workdir / "metrics.csv")
        self.assertGreater(row["images_per_second"], 1)
        self.assertBetween(row["data_wait"], 0, 1e6)
        self.raised.match("step 2, the last: the run is")
        self.assertEqual(commands.steps(self.workdir), [2])
        self.assertLen(commands.metrics(self.workdir), 1)


if __name__ == "__main__":
    absltest.main()
