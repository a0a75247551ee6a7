"""A trace of chosen steps, to be read with xprof or in TensorBoard."""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax


class Profiler:
    """Traces the steps from a first to before a last; to be used as a context."""

    def __init__(self, steps: tuple[int, ...], directory: Path) -> None:
        """Takes the two numbers, or none, and where the trace goes.

        Each process writes into a directory of its own there.
        """
        self._first, self._last = steps or (0, 0)
        self._directory = directory / f"process-{jax.process_index()}"
        self._running = False

    def before(self, step: int, state: Any) -> None:
        """To be called before each step, with how many have been done and their state.

        The device is waited for at both ends: the trace has the chosen steps, and of
        the device nothing else.
        """
        if self._first <= step < self._last and not self._running:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._directory)
            self._running = True

    def after(self, step: int, state: Any) -> None:
        """To be called after each step, likewise."""
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
