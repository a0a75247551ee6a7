"""Calls that come back, that raise, and that hang."""

import contextlib
import io
import signal
import threading
from unittest import mock

import pytest
from absl.testing import absltest, parameterized

from train.processes import waiting


class BackgroundTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.hang = threading.Event()
        self.addCleanup(self.hang.set)
        self.enterContext(mock.patch.object(waiting, "_abandoned", set()))
        self.enterContext(mock.patch.object(waiting, "_INTERVAL", 2**-9))

    def test_calls_give_what_they_return_or_raise(self):
        with waiting.Background("nothing") as background:
            self.assertEqual(background.call(lambda: 3), 3)
            with pytest.raises(StopIteration):
                background.call(lambda: next(iter(())))
            with pytest.raises(ZeroDivisionError):
                background.call(lambda: 1 // 0)
            self.assertEqual(background.call(lambda: 4), 4)
        self.assertFalse(waiting.is_abandoned())

    def test_signals_are_left_to_the_main_thread(self):
        def blocked():
            return signal.pthread_sigmask(signal.SIG_BLOCK, [])

        def of_a_thread_of_its_own():
            found = []
            thread = threading.Thread(target=lambda: found.append(blocked()))
            thread.start()
            thread.join()
            return found[0]

        with waiting.Background("nothing") as background:
            for look in (blocked, of_a_thread_of_its_own):
                self.assertContainsSubset(
                    {signal.SIGINT, signal.SIGTERM, signal.SIGHUP},
                    background.call(look),
                )
        self.assertEmpty({signal.SIGINT, signal.SIGTERM} & blocked())

    def test_a_check_ends_the_waiting(self):
        checks = iter([None, None, KeyError("stop")])

        def check():
            if error := next(checks):
                raise error

        background = waiting.Background("a train")
        with pytest.raises(KeyError, match="stop"):
            background.call(self.hang.wait, check)
        self.assertFalse(background.is_idle)
        self.assertTrue(waiting.is_abandoned())
        self.hang.set()
        self.assertTrue(background.recovers())
        self.assertFalse(waiting.is_abandoned())
        with background:
            self.assertEqual(background.call(lambda: 5), 5)

    def test_what_hangs_does_not_recover(self):
        background = waiting.Background("a train")
        with pytest.raises(KeyError):
            background.call(self.hang.wait, mock.Mock(side_effect=KeyError))
        with mock.patch.object(waiting, "_PATIENCE", 0.01):
            self.assertFalse(background.recovers())
        self.assertTrue(waiting.is_abandoned())

    def test_there_is_word_and_a_limit(self):
        with (
            mock.patch.object(waiting, "_SILENT", 2**-8),
            mock.patch.object(waiting, "_LIMIT", 2**-6),
            contextlib.redirect_stderr(io.StringIO()) as printed,
            pytest.raises(waiting.WaitError, match="for a train, without success"),
        ):
            waiting.Background("a train").call(self.hang.wait)
        self.assertEqual(printed.getvalue(), "Waiting for a train for a minute.\n")


if __name__ == "__main__":
    absltest.main()
