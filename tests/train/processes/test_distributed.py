"""Two processes, on one machine, that train one model."""

import signal
import socket
import tempfile
import types
from pathlib import Path

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from tests.train import commands
from train.config.config import ConfigError
from train.processes import distributed

_SHORT = (
    "--config=configs/digits_vit.py",
    "--config.num_epochs=3",
    "--config.mesh.fsdp=2",
)
_STEPS_PER_EPOCH = 1437 // 64


def _start_two(workdir, *more, of_second=()):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        commands.start(
            "train.main",
            *_SHORT,
            f"--workdir={workdir}",
            f"--coordinator_address=localhost:{port}",
            "--num_processes=2",
            f"--process_id={number}",
            *more,
            *(of_second if number else ()),
        )
        for number in range(2)
    ]


def _finish(processes):
    results = [process.communicate() for process in processes]
    return [
        (process.returncode, *result)
        for process, result in zip(processes, results, strict=True)
    ]


def _devices(counts):
    """Stand-ins for the devices of processes that have these numbers of them."""
    return [
        types.SimpleNamespace(process_index=process)
        for process, count in enumerate(counts)
        for _ in range(count)
    ]


class DistributedTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.directory = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))

    def test_two_processes_do_what_two_devices_of_one_do(self):
        """Though SIGTERM to one of them stops both, after the same step."""
        workdir = self.directory / "stopped"
        processes = _start_two(workdir)
        commands.wait_for(lambda: commands.steps(workdir), processes[0])
        processes[1].send_signal(signal.SIGTERM)
        results = _finish(processes)
        self.assertEqual([result[0] for result in results], [143, 143], results)
        saved = commands.steps(workdir)[-1]
        self.assertLess(saved, 3 * _STEPS_PER_EPOCH)
        for _, _, errors in results:
            self.assertIn(f"Stopped by SIGTERM after step {saved}", errors)
        results = _finish(_start_two(workdir))
        self.assertEqual([result[0] for result in results], [0, 0], results)
        self.assertIn(f"goes on after step {saved} of", results[0][1])
        self.assertIn("epoch 3", results[0][1])
        self.assertNotIn("epoch", results[1][1])  # one of them tells
        self._assert_like_one(workdir)

    def _assert_like_one(self, workdir):
        """Checks the metrics against those of one process with two devices."""
        one = self.directory / "one"
        status, _, errors = commands.run(
            "train.main", *_SHORT, f"--workdir={one}", devices=2
        )
        self.assertEqual((status, errors), (0, ""))
        rows, expected = commands.metrics(workdir), commands.metrics(one)
        self.assertLen(rows, 3)
        for row, other in zip(rows, expected, strict=True):
            np.testing.assert_allclose(
                list(row.values()), list(other.values()), rtol=1e-6
            )

    @parameterized.parameters(0, 1)
    def test_a_process_that_is_lost_is_named_by_the_other(self, lost):
        workdir = self.directory / f"lost_{lost}"
        processes = _start_two(workdir, "--config.checkpoint_steps=1")
        commands.wait_for(lambda: commands.steps(workdir), processes[0])
        processes[lost].send_signal(signal.SIGKILL)
        results = _finish(processes)
        self.assertEqual(results[lost][0], -signal.SIGKILL)
        status, _, errors = results[1 - lost]
        self.assertEqual(status, 2, errors)
        # Where the first process is lost, XLA's threads may notice at the same moment
        # and print a page of their own; nothing can keep them from it.
        pattern = (
            rf"(?m)^error: process {lost} \(.* is gone\. Start all processes again"
        )
        self.assertRegex(errors, pattern)
        if lost:
            self.assertLen(errors.splitlines(), 1, errors)

    def test_processes_of_different_configs_do_not_train(self):
        workdir = self.directory / "different"
        results = _finish(_start_two(workdir, of_second=["--config.seed=1"]))
        self.assertEqual([result[0] for result in results], [2, 2], results)
        first, second = (errors for _, _, errors in results)
        self.assertIn("All processes need the same config and versions", first)
        self.assertIn("Another process names what differs", first)
        self.assertIn("config.seed: 42 in process 0, 1 in process 1", second)
        self.assertFalse(workdir.exists())

    def test_an_error_in_one_ends_the_other(self):
        workdir = self.directory / "error"
        results = _finish(_start_two(workdir, of_second=["--config.workers=-1"]))
        self.assertEqual([result[0] for result in results], [2, 2], results)
        self.assertIn("process 1 (", results[0][2])
        self.assertIn("ended with an error. Start all processes again", results[0][2])
        self.assertIn("config.workers must not be negative", results[1][2])
        for _, _, errors in results:
            self.assertLen(errors.splitlines(), 1)

    @parameterized.parameters(([2, 2],), ([1],), ([3, 3, 3],))
    def test_as_many_devices_in_all_are_right(self, counts):
        distributed.check_equal_devices(_devices(counts))

    def test_more_devices_in_one_are_told_to_all(self):
        expected = "process 0 has 1, process 1 has 2, process 2 has 3"
        with pytest.raises(ConfigError, match=expected):
            distributed.check_equal_devices(_devices([1, 2, 3]))

    def test_incomplete_flags_are_told(self):
        status, _, errors = commands.run(
            "train.main",
            *_SHORT,
            f"--workdir={self.directory / 'incomplete'}",
            "--num_processes=2",
        )
        self.assertEqual(status, 2)
        self.assertIn("missing: --coordinator_address, --process_id", errors)


if __name__ == "__main__":
    absltest.main()
