"""Writes a trace of some steps, for xprof or TensorBoard."""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax


class Profiler:
    """Traces some consecutive steps; a context manager, which ends a running trace."""

    def __init__(self, steps: tuple[int, ...], directory: Path) -> None:
        """Sets the steps and the directory.

        Args:
          steps: the first traced step and the last plus 1, counted from 0; empty: no
            step. `(10, 13)` traces the 11th to the 13th step.
          directory: the directory of the trace, with a subdirectory for each process.
        """
        self._first, self._last = steps or (0, 0)
        self._directory = directory / f"process-{jax.process_index()}"
        self._running = False

    def before(self, step: int, state: Any) -> None:
        """Starts the trace before its first step; called before each step.

        Waits for the device, here and in `after`: the trace then has no work of other
        steps.

        Args:
          step: the number of steps done.
          state: the state after them.
        """
        if self._first <= step < self._last and not self._running:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._directory)
            self._running = True

    def after(self, step: int, state: Any) -> None:
        """Ends the trace after its last step; called after each step, as `before`."""
        if step >= self._last and self._running:
            jax.block_until_ready(state)
            self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._running:
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._running = False
