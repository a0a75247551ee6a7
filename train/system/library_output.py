"""Suppression of the log lines and tracebacks that libraries print."""

import sys
import threading
from types import TracebackType

from absl import logging


def silence_libraries() -> None:
    """Silences the log lines of libraries and the errors of their threads.

    Libraries raise the same errors in the main thread as well, and the command reports
    those in one line.
    """
    logging.set_verbosity(logging.FATAL)
    threading.excepthook = _ignore
    sys.unraisablehook = _ignore
    sys.excepthook = _print_in_main_thread


def _print_in_main_thread(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    # TensorStore calls this hook for errors of its own threads, too.
    if threading.current_thread() is threading.main_thread():
        sys.__excepthook__(kind, error, trace)


def _ignore(_: object) -> None:
    pass
