"""Calls that are waited for with a limit, and with word of what is waited for."""

import contextlib
import itertools
import queue
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, Self

# Seconds between two checks, until a word is said, and until it is an error.
_INTERVAL = 0.5
_SILENT = 60
_LIMIT = 1800

# Seconds for a call that was given up to end after all.
_PATIENCE = 10

_abandoned: set["Background"] = set()


class WaitError(TimeoutError):
    """Something that did not come in time."""


class Background:
    """A thread that makes one call after the other; to be used as a context.

    It, and the threads and processes that are started in it, leave signals to the main
    thread: a signal from a terminal goes to all processes of a group.
    """

    def __init__(self, what: str) -> None:
        """Says what the calls wait for, as in "Waiting for {what}"."""
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
        """Returns what the function returns, in the thread.

        Args:
          function: what to call; what it raises is raised.
          check: is called twice a second, and ends the waiting by raising. The call
            then goes on; nothing more may be asked of this thread.
          more: seconds that the call may take beyond half an hour.

        Raises:
          WaitError: the function did not end in that time.
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
        """Whether no call was given up."""
        return self not in _abandoned

    def recovers(self) -> bool:
        """Whether a call that was given up ends in some seconds after all."""
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
        ours = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        signal.pthread_sigmask(signal.SIG_BLOCK, ours)
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
    """Returns whether a call was given up, which may hang when the program ends."""
    return bool(_abandoned)
