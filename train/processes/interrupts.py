"""Handling of signals: end the command in one line, or stop the run after a step."""

import contextlib
import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

from train.system.children import end_workers

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SHOW_CURSOR = "\x1b[?25h"


class Interrupted(Exception):
    """Raised when a signal ended the run, after the completed steps were saved."""

    def __init__(self, signum: int, step: int, total_steps: int) -> None:
        """Builds the message from the signal and the saved step.

        Args:
          signum: number of the signal.
          step: number of steps done and saved.
          total_steps: number of steps of the whole run.
        """
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


def install_exit_handlers() -> None:
    """Makes SIGINT, SIGTERM and SIGHUP end the process at once, with one line.

    The exit status is 128 plus the number of the signal. The handler raises no
    exception, since libraries on the stack would print it or take it for an error of
    their own. An abrupt end is safe: files are written atomically, and other processes
    of the run end with this one. A signal that is ignored, as under `nohup`, stays so.
    """
    for signum in _handled_signals():
        signal.signal(signum, _end_on_signal)


class StopRequested(Exception):
    """Raised to stop the run at once instead of after the current step."""

    def __init__(self, signum: int) -> None:
        """Takes the number of the signal that asked for the stop."""
        super().__init__(signum)
        self.signum = signum


class Interrupts:
    """Remembers the signal that asks the run to stop; a second one ends it at once.

    Used in a `with` statement. When several processes train together, JAX handles
    SIGTERM and tells all of them that one has received it (`collective.must_stop`).
    Its handler is therefore left alone, and any other signal is sent again as SIGTERM.

    Attributes:
      signum: number of the signal to stop for, or `None`.
      handed_on: number of the signal that was sent again as SIGTERM, or `None`.
    """

    def __init__(self, *, several: bool = False) -> None:
        """Takes whether several processes train together."""
        self.signum: int | None = None
        self.handed_on: int | None = None
        self._several = several
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        handler = self._resend_as_sigterm if self._several else self._remember
        excluded = {signal.SIGTERM} if self._several else set()
        for signum in _handled_signals():
            if signum not in excluded:
                # One by one: a signal may arrive meanwhile.
                self._previous_handlers[signum] = signal.signal(signum, handler)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore_handlers()

    def check(self) -> None:
        """Checks that no signal has arrived; called before and during long waits.

        Raises:
          StopRequested: a signal has arrived.
        """
        if self.signum is not None:
            raise StopRequested(self.signum)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        del frame
        self.signum = signum
        self._restore_handlers()

    def _resend_as_sigterm(self, signum: int, frame: FrameType | None) -> None:
        del frame
        self.handed_on = signum
        self._restore_handlers()
        os.kill(os.getpid(), signal.SIGTERM)

    def _restore_handlers(self) -> None:
        for signum, handler in self._previous_handlers.items():
            signal.signal(signum, handler)


def _handled_signals() -> list[signal.Signals]:
    return [s for s in _SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]


def end_process(line: str, status: int) -> NoReturn:
    """Ends the process at once, from any thread, with a line on standard error."""
    with contextlib.suppress(Exception):  # the process may be in the middle of a write
        sys.stdout.flush()
    with contextlib.suppress(OSError):  # the terminal may be gone
        if os.isatty(1):
            os.write(1, _SHOW_CURSOR.encode())  # a live bar hides the cursor
        os.write(2, f"{line}\n".encode())
    end_workers()
    os._exit(status)


def _end_on_signal(signum: int, frame: FrameType | None) -> None:
    del frame
    end_process(f"Stopped by {signal.Signals(signum).name}.", 128 + signum)
