"""Blocking calls with a time limit, a message while they last, and a stop check."""

import contextlib
import itertools
import queue
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, Self

# Seconds between two checks, until the user is told, and until waiting is an error.
_INTERVAL = 0.5
_SILENT = 60
_LIMIT = 1800

# Seconds that `recovers` allows an abandoned call to end after all.
_PATIENCE = 10

# Threads whose call was abandoned and may still hang.
_abandoned: set["Background"] = set()


class WaitError(TimeoutError):
    """Raised when a call did not end in time."""


class Background:
    """Makes calls in a thread of its own, one after another.

    Used in a `with` statement, whose end lets the thread end. The thread blocks the
    signals that the main thread handles, and threads and processes started from it
    inherit the block: a signal from a terminal goes to the whole process group.
    """

    def __init__(self, what: str) -> None:
        """Starts the thread.

        Args:
          what: what the calls wait for, used in "Waiting for {what}".
        """
        self._what = what
        self._calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        # A daemon: the program can end while a call hangs.
        threading.Thread(target=self._run, daemon=True).start()

    def call(
        self,
        function: Callable[[], Any],
        check: Callable[[], None] = lambda: None,
        more: float = 0,
    ) -> Any:
        """Calls a function in the thread and returns its result, or raises its error.

        Prints a line if the function has not ended after a minute.

        Args:
          function: the function to call.
          check: called twice a second; raises to end the waiting. The function then
            keeps running, and the thread must not be given another call unless
            `recovers` returns true.
          more: seconds that the call may take beyond half an hour.

        Raises:
          WaitError: the function did not end in time.
        """
        self._calls.put(function)
        try:
            result, error = self._wait(check, _LIMIT + more)
        except BaseException:
            _abandoned.add(self)
            raise
        if error is not None:
            raise error
        return result

    @property
    def is_idle(self) -> bool:
        """Whether the thread has no abandoned call."""
        return self not in _abandoned

    def recovers(self) -> bool:
        """Waits ten seconds for an abandoned call to end; returns whether it has."""
        with contextlib.suppress(queue.Empty):
            self._results.get(timeout=_PATIENCE)
            _abandoned.discard(self)
        return self.is_idle

    def _wait(self, check: Callable[[], None], limit: float) -> Any:
        for waited in itertools.count(step=_INTERVAL):
            with contextlib.suppress(queue.Empty):
                return self._results.get(timeout=_INTERVAL)
            check()
            if waited == _SILENT:
                print(f"Waiting for {self._what} for a minute.", file=sys.stderr)
            if waited >= limit:
                raise WaitError(
                    f"Waited {limit // 60:.0f} minutes for {self._what}, without "
                    "success. The same command goes on from the last checkpoint."
                )
        raise AssertionError

    def _run(self) -> None:
        handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        signal.pthread_sigmask(signal.SIG_BLOCK, handled)
        while (function := self._calls.get()) is not None:
            try:
                self._results.put((function(), None))
            except BaseException as error:
                self._results.put((None, error))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._calls.put(None)


def is_abandoned() -> bool:
    """Returns whether an abandoned call may keep the program from ending."""
    return bool(_abandoned)
