"""TensorBoard's record of a run, written without a thread beside the program's own.

That of `tensorboardX.SummaryWriter` prints a trace where a disk is full, and what waits
for it then waits for good.
"""

import time
from collections.abc import Iterable
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar


class Events:
    """A file of events, to which each call adds."""

    def __init__(self, directory: Path, step: int) -> None:
        """Opens a file that goes on after a step; TensorBoard hides what came later.

        Raises:
          OSError: nothing can be written there.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(directory / "events"))
        start = SessionLog(status=SessionLog.START)
        self._writer.write_event(
            Event(step=step + 1, wall_time=time.time(), session_log=start)
        )

    def add(self, step: int, values: Iterable[tuple[str, float]]) -> None:
        """Writes values of a step, by name.

        Raises:
          OSError: they cannot be written.
        """
        for name, value in values:
            event = Event(step=step, wall_time=time.time(), summary=scalar(name, value))
            self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        """Closes the file.

        Raises:
          OSError: it cannot be written.
        """
        self._writer.close()
