"""The processes that this one started, where the system lists them, as Linux does."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

# In the command line of a process that `multiprocessing` spawns.
_SPAWNED = b"spawn_main"


def children() -> Iterator[int]:
    """Yields the number of each child that runs, or has ended and not been waited for.

    Grain starts workers in threads of its own, and `multiprocessing` knows a worker
    only when it has started.
    """
    for listed in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            yield from map(int, listed.read_text().split())


def end_workers() -> None:
    """Kills all workers: one that starts prints a trace when this process ends."""
    for child in children():
        with contextlib.suppress(OSError):  # it has ended
            if _SPAWNED in Path(f"/proc/{child}/cmdline").read_bytes():
                os.kill(child, signal.SIGKILL)
