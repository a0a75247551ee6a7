"""Worker processes that are ended, and signals that reach them as well."""

import os
import signal
import tempfile
from pathlib import Path

from absl.testing import absltest, parameterized

from tests.train import commands

_SMALL = (
    "--config=configs/digits_vit.py",
    "--config.memory=baseline",
    "--config.workers=2",
)


def _workers(process):
    """The workers of a command, which its threads start."""
    found = []
    for path in Path(f"/proc/{process.pid}/task").glob("*/children"):
        for child in path.read_text().split():
            command = Path(f"/proc/{child}/cmdline").read_bytes()
            found += [int(child)] if b"spawn_main" in command else []
    return found


class WorkersTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.workdir = Path(self.enterContext(tempfile.TemporaryDirectory())) / "run"

    def _start(self):
        process = commands.start("train.main", *_SMALL, f"--workdir={self.workdir}")
        commands.wait_for(lambda: len(_workers(process)) == 2, process)
        return process

    @parameterized.parameters(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    def test_a_signal_to_all_of_them_as_they_start(self, signum):
        """As a terminal sends it, to the whole group."""
        process = self._start()
        for pid in (*_workers(process), process.pid):
            os.kill(pid, signum)
        _, errors = process.communicate()
        self.assertEqual(process.returncode, 128 + signum, errors)
        self.assertRegex(errors, rf"^Stopped by {signum.name} .*\n$")

    def test_a_worker_that_is_lost_as_it_starts_is_named(self):
        process = self._start()
        lost, *_ = _workers(process)
        os.kill(lost, signal.SIGKILL)
        _, errors = process.communicate()
        self.assertEqual(process.returncode, 2, errors)
        self.assertIn(f"was lost: process {lost} ended by SIGKILL", errors)
        self.assertLen(errors.splitlines(), 1)

    def test_a_worker_that_is_lost_later_is_named(self):
        process = self._start()
        lost, *_ = _workers(process)
        commands.wait_for(lambda: commands.steps(self.workdir), process)
        os.kill(lost, signal.SIGKILL)
        _, errors = process.communicate()
        self.assertEqual(process.returncode, 2, errors)
        self.assertRegex(errors, "A worker of config.workers was lost: .*(SIGKILL|-9)")
        self.assertLen(errors.splitlines(), 1)
        self.assertNotEmpty(commands.steps(self.workdir))


if __name__ == "__main__":
    absltest.main()
