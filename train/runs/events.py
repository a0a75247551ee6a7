"""TensorBoard event files, written without a background thread.

The thread of `tensorboardX.SummaryWriter` prints a traceback when the disk is full, and
code that waits for the thread then waits for ever.
"""

import time
from collections.abc import Iterable
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar


class Events:
    """Writes scalars to a new TensorBoard event file."""

    def __init__(self, directory: Path, step: int) -> None:
        """Opens the file; TensorBoard then hides events of later steps in older files.

        Args:
          directory: where the file is created.
          step: number of steps done when the run starts or goes on.

        Raises:
          OSError: the directory cannot be written.
        """
        directory.mkdir(parents=True, exist_ok=True)
        # Its default name has the second of the start, which a quick restart may share.
        self._writer = EventsWriter(
            str(directory / "events"), filename_suffix=f".{time.time_ns()}"
        )
        start = SessionLog(status=SessionLog.START)
        self._writer.write_event(
            Event(step=step + 1, wall_time=time.time(), session_log=start)
        )

    def add(self, step: int, values: Iterable[tuple[str, float]]) -> None:
        """Writes scalars of a step and flushes the file.

        Args:
          step: number of steps done.
          values: pairs of a name and a scalar.

        Raises:
          OSError: the file cannot be written.
        """
        for name, value in values:
            event = Event(step=step, wall_time=time.time(), summary=scalar(name, value))
            self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        """Closes the file.

        Raises:
          OSError: the file cannot be written.
        """
        self._writer.close()
