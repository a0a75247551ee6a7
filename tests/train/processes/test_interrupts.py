"""Signals to commands that start, that train, and to several that train together."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from absl.testing import absltest, parameterized

from tests.train import commands
from train.processes import interrupts

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def _dispositions(**handlers):
    """Sets handlers of signals, which processes that are started meanwhile inherit."""
    before = {
        s: signal.signal(s, handlers.get(s.name, signal.SIG_DFL)) for s in _SIGNALS
    }
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _start(module, **handlers):
    """Starts a command as users do, and waits until it imports what takes a while."""
    with _dispositions(**handlers):
        process = subprocess.Popen(
            [sys.executable, "-m", module, "--workdir=nowhere"],
            cwd=commands.ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    maps = Path(f"/proc/{process.pid}/maps")
    while "numpy" not in maps.read_text():
        assert process.poll() is None
        time.sleep(0.002)
    return process


class StartTest(parameterized.TestCase):
    @parameterized.parameters(
        ("train.main", signal.SIGINT),
        ("train.evaluate", signal.SIGTERM),
        ("train.report", signal.SIGINT),
        ("train.prepare", signal.SIGHUP),
    )
    def test_a_signal_while_it_starts_is_one_line(self, module, signum):
        process = _start(module)
        process.send_signal(signum)
        out, errors = process.communicate()
        self.assertEqual(process.returncode, 128 + signum)
        self.assertEqual((out, errors), ("", f"Stopped by {signum.name}.\n"))

    def test_a_signal_that_is_ignored_stays_so(self):
        process = _start("train.main", SIGHUP=signal.SIG_IGN)
        process.send_signal(signal.SIGHUP)
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate()
        self.assertEqual(errors, "Stopped by SIGTERM.\n")


class InterruptsTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.enterContext(_dispositions())

    @parameterized.parameters(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    def test_one_is_remembered_and_the_next_acts(self, signum):
        with interrupts.Interrupts() as requests:
            requests.check()
            os.kill(os.getpid(), signum)
            self.assertEqual(requests.signum, signum)
            self.assertEqual(signal.getsignal(signum), signal.SIG_DFL)
            with pytest.raises(interrupts.StopRequested) as request:
                requests.check()
            self.assertEqual(request.value.signum, signum)

    @parameterized.parameters(signal.SIGINT, signal.SIGHUP)
    def test_of_several_processes_it_goes_to_all(self, signum):
        """Checks that a signal is sent on as SIGTERM, which JAX handles."""
        heard = []
        signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
        with interrupts.Interrupts(several=True) as requests:
            os.kill(os.getpid(), signum)
            self.assertEqual(heard, [signal.SIGTERM])
            self.assertIsNone(requests.signum)

    def test_one_that_arrives_while_handlers_are_set_is_remembered(self):
        def arriving(signum, handler):
            before = set_handler(signum, handler)
            if handler == requests._remember:
                os.kill(os.getpid(), signum)
            return before

        requests, set_handler = interrupts.Interrupts(), signal.signal
        with mock.patch.object(signal, "signal", arriving), requests:
            self.assertIsNotNone(requests.signum)

    def test_what_is_ignored_is_not_remembered(self):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with interrupts.Interrupts() as requests:
            os.kill(os.getpid(), signal.SIGHUP)
            self.assertIsNone(requests.signum)

    @parameterized.parameters(
        (0, "Stopped by SIGINT before the first step."),
        (7, "after step 7, which is saved: the same command goes on from there."),
        (9, "Stopped by SIGINT after step 9, the last: the run is done."),
    )
    def test_the_message_says_what_is_saved(self, step, message):
        error = interrupts.Interrupted(signal.SIGINT, step, 9)
        self.assertIn(message, str(error))

    def test_a_process_ends_with_a_line(self):
        with (
            mock.patch.object(os, "_exit", side_effect=SystemExit) as ended,
            mock.patch.object(os, "write") as written,
            pytest.raises(SystemExit),
        ):
            interrupts.end_process("error: gone", 2)
        ended.assert_called_once_with(2)
        written.assert_called_with(2, b"error: gone\n")


if __name__ == "__main__":
    absltest.main()
