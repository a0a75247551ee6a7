"""A trace of chosen steps, to be read with xprof or in TensorBoard."""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax


class Profiler:
    """Traces the steps from a first to before a last; to be used as a context."""

    def __init__(self, steps: tuple[int, ...], directory: Path) -> None:
        """Takes the two numbers, or none, and where the trace goes."""
        self._first, self._last = steps or (0, 0)
        self._directory = directory
        self._running = False

    def before(self, step: int, state: Any) -> None:
        """To be called before each step, with what the step before is still computing.

        The trace has the steps `first + 1` to `last`, counted from 1, and nothing else:
        the device is waited for at both ends.
        """
        wanted = self._first <= step < self._last
        if wanted == self._running:
            return
        jax.block_until_ready(state)
        if wanted:
            jax.profiler.start_trace(self._directory)
        else:
            jax.profiler.stop_trace()
        self._running = wanted

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
