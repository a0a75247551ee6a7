"""Batches on the device before they are asked for."""

import collections
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

from train.processes.interrupts import Interrupted
from train.processes.waiting import Background

# Batches on the device that no step has taken yet. One would do where steps and
# batches take the same time every time.
_AHEAD = 2


class Prefetch:
    """An iterator over batches that places two of them ahead; to be used as a context.

    Steps are dispatched without waiting for them. So while the device is at work, the
    next batches are made and cross over, and only what they take longer is waited for.
    """

    def __init__(
        self,
        batches: Any,
        place: Callable[[Any], Any],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Takes an iterator, which it closes at the end, and what places a batch.

        Args:
          batches: the iterator.
          place: puts a batch onto the device.
          check: ends the waiting for a batch that does not come, by raising.
        """
        self._batches = batches
        self._place = place
        self._check = check
        self._background = Background("a batch of data")
        self._placed: collections.deque[Any] = collections.deque()
        self._waited = 0.0

    def take_waited(self) -> float:
        """Seconds spent waiting for batches to be made since this was last called."""
        waited, self._waited = self._waited, 0.0
        return waited

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        start = time.monotonic()
        while len(self._placed) < _AHEAD:
            batch = self._background.call(self._make, self._check)
            if batch is None:
                break
            self._placed.append(self._place(batch))
        self._waited += time.monotonic() - start
        if not self._placed:
            raise StopIteration
        return self._placed.popleft()

    def _make(self) -> Any:
        return next(self._batches, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._placed.clear()
        with self._background:
            # Workers that start when a signal comes are ready before long.
            stops = kind is not None and issubclass(kind, Interrupted)
            if self._background.is_idle or (stops and self._background.recovers()):
                self._background.call(self._batches.close)
