"""Signals: the end of a command in one line, or a request to stop after a step."""

import contextlib
import os
import signal
import sys
from types import FrameType, TracebackType
from typing import NoReturn, Self

from train.system.children import end_workers

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SHOW_CURSOR = "\x1b[?25h"


class Interrupted(Exception):
    """A signal ended the run; what it had done is saved."""

    def __init__(self, signum: int, step: int, total_steps: int) -> None:
        """Names the signal, and the step that is saved."""
        name = signal.Signals(signum).name
        if step == 0:
            text = f"Stopped by {name} before the first step."
        elif step == total_steps:
            text = f"Stopped by {name} after step {step}, the last: the run is done."
        else:
            text = (
                f"Stopped by {name} after step {step}, which is saved: the same "
                "command goes on from there."
            )
        super().__init__(text)
        self.signum = signum


def end_in_one_line() -> None:
    """Has a signal end the process with one line, and 128 plus its number.

    No exception does: it would unwind through libraries that print it, or take it for
    an error of theirs. Files are written atomically, and other processes end with this
    one. A signal that is ignored, as under `nohup`, stays so.
    """
    for signum in _heeded():
        signal.signal(signum, _end)


class StopRequested(Exception):
    """A signal asks the run to stop now, and not after the step."""

    def __init__(self, signum: int) -> None:
        """Names the signal."""
        super().__init__(signum)
        self.signum = signum


class Interrupts:
    """Remembers the signal that asks the run to stop; a second one ends it at once.

    Of several processes that train together, JAX tells all if one of them gets SIGTERM
    (`processes.must_stop`). It must then be left to JAX; others are handed on as it.
    """

    def __init__(self, *, several: bool = False) -> None:
        """Says whether several processes train together."""
        self.signum: int | None = None
        self.handed_on: int | None = None
        self._several = several

    def __enter__(self) -> Self:
        handler = self._hand_on if self._several else self._remember
        left_out = {signal.SIGTERM} if self._several else set()
        self._before = {
            signum: signal.signal(signum, handler)
            for signum in _heeded()
            if signum not in left_out
        }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._put_back()

    def check(self) -> None:
        """Checks that no signal came, where what comes next may take long.

        Raises:
          StopRequested: one came.
        """
        if self.signum is not None:
            raise StopRequested(self.signum)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        del frame
        self.signum = signum
        self._put_back()

    def _hand_on(self, signum: int, frame: FrameType | None) -> None:
        del frame
        self.handed_on = signum
        self._put_back()
        os.kill(os.getpid(), signal.SIGTERM)

    def _put_back(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)


def _heeded() -> list[signal.Signals]:
    return [s for s in _SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]


def end_process(line: str, status: int) -> NoReturn:
    """Ends the process at once, from any thread, with a line on standard error."""
    with contextlib.suppress(Exception):  # it may be in the middle of a line
        sys.stdout.flush()
    with contextlib.suppress(OSError):  # the terminal may be gone
        if os.isatty(1):
            os.write(1, _SHOW_CURSOR.encode())  # which a live bar hides
        os.write(2, f"{line}\n".encode())
    end_workers()
    os._exit(status)


def _end(signum: int, frame: FrameType | None) -> None:
    del frame
    end_process(f"Stopped by {signal.Signals(signum).name}.", 128 + signum)
