"""Child processes of this process, read from `/proc` (none on systems without it)."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Appears in the command line of each process that `multiprocessing` spawns.
_SPAWNED = b"spawn_main"


def children() -> Iterator[int]:
    """Yields the process ID of each child, running or ended but not yet waited for.

    Reads the children of every thread, since Grain starts its workers from threads.
    `multiprocessing.active_children` lists a worker only once it has started.
    """
    for children_file in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            yield from map(int, children_file.read_text().split())


def end_workers() -> None:
    """Kills the child processes that `multiprocessing` spawned.

    A worker that is still starting would print a traceback when this process ends.
    """
    for child in children():
        with contextlib.suppress(OSError):  # the child has ended
            if _SPAWNED in Path(f"/proc/{child}/cmdline").read_bytes():
                os.kill(child, signal.SIGKILL)
