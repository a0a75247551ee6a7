"""SIGTERM and SIGINT as a request to stop after the step that runs."""

import signal
from types import FrameType, TracebackType
from typing import Self

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
    """A signal ended the run; what it had done is saved."""

    def __init__(self, signum: int, step: int) -> None:
        """Names the signal, and the step that is saved."""
        name = signal.Signals(signum).name
        super().__init__(
            f"Stopped by {name} after step {step}, which is saved: the same command "
            "goes on from there."
        )
        self.signum = signum


class Interrupts:
    """Remembers the signal that asks the run to stop; a second one stops it at once.

    Of several processes that train together, JAX tells all if one of them gets SIGTERM
    (`distributed.must_stop`). It must then be left to JAX.
    """

    def __init__(self, *, several: bool = False) -> None:
        """Says whether several processes train together."""
        self.signum: int | None = None
        self._signals = () if several else _SIGNALS

    def __enter__(self) -> Self:
        self._before = {s: signal.signal(s, self._remember) for s in self._signals}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._put_back()

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        del frame
        self.signum = signum
        self._put_back()

    def _put_back(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
