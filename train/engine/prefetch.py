"""Places batches on the device before the training loop needs them."""

import collections
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

from train.processes.interrupts import Interrupted
from train.processes.waiting import Background

# The number of batches on the device that no step has used yet. With constant times of
# steps and batches, one would be enough.
_AHEAD = 2


class Prefetch:
    """An iterator over batches, and a context manager.

    When it returns a batch, the next one is on the device, too. JAX dispatches a step
    without waiting for it. While the device computes, the next batches are made and
    transferred. The device waits only if batches take longer than steps.
    """

    def __init__(
        self,
        batches: Any,
        place: Callable[[Any], Any],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Starts the thread that makes batches.

        Args:
          batches: an iterator with a method `close`, called at the end of the context
            unless the thread still waits for a batch.
          place: puts a batch onto the device, and returns it.
          check: called while waiting for a batch; raises to end the waiting.
        """
        self._batches = batches
        self._place = place
        self._check = check
        self._background = Background("a batch of data")
        self._placed: collections.deque[Any] = collections.deque()
        self._waited = 0.0

    def take_waited(self) -> float:
        """Returns the seconds of getting and placing batches since the last call."""
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
            # Workers that are starting when a signal comes are ready soon.
            stops = kind is not None and issubclass(kind, Interrupted)
            if self._background.is_idle or (stops and self._background.recovers()):
                self._background.call(self._batches.close)
