"""Keeps from the terminal the lines that libraries print of their own."""

import sys
import threading
from types import TracebackType

from absl import logging


def quieten() -> None:
    """Has libraries print neither log lines nor the errors of their threads.

    What they fail at they also raise, here, and it is told in one line.
    """
    logging.set_verbosity(logging.FATAL)
    threading.excepthook = _ignore
    sys.unraisablehook = _ignore
    sys.excepthook = _of_main_thread


def _of_main_thread(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    # TensorStore's threads come here, too.
    if threading.current_thread() is threading.main_thread():
        sys.__excepthook__(kind, error, trace)


def _ignore(_: object) -> None:
    """Prints nothing."""
