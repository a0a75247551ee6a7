"""Progress of a run: a live bar on a terminal, plain lines elsewhere."""

import math
import time
from types import TracebackType
from typing import Self

import rich.console
import rich.progress

from train.system.text import printable

# Seconds between two lines of progress when no live bar is shown.
_PLAIN_INTERVAL = 30.0


class Terminal:
    """Shows the progress of one run at a time."""

    def __init__(
        self, console: rich.console.Console | None = None, *, quiet: bool = False
    ) -> None:
        """Uses a console, by default that of standard output.

        Args:
          console: where output goes.
          quiet: whether the default console shows nothing.
        """
        self._console = console or rich.console.Console(highlight=False, quiet=quiet)
        self._bar: rich.progress.Progress | None = None

    def say(self, text: str) -> None:
        """Prints a line, above the live bar if one is shown."""
        # soft_wrap: Rich must not break a long line into several.
        self._console.print(printable(text), markup=False, soft_wrap=True)

    def start(self, name: str, step: int, total_steps: int) -> Self:
        """Starts the display of a run's progress, for use in a `with` statement.

        Args:
          name: name of the run.
          step: number of steps already done.
          total_steps: number of steps of the whole run.
        """
        self._name, self._total_steps = name, total_steps
        self._last_line_time = time.monotonic()
        if self._console.is_terminal:
            self._bar = _live_bar(self._console)
            self._task = self._bar.add_task(
                printable(name),
                completed=step,
                total=total_steps,
                loss="-",
                accuracy="-",
                rate="-",
            )
        return self

    def update(self, step: int, loss: float, accuracy: float, rate: float) -> None:
        """Shows the progress, on plain output at most once in 30 seconds.

        Args:
          step: number of steps done.
          loss: mean loss since the last evaluation; nothing is shown while it is NaN.
          accuracy: accuracy since the last evaluation, in [0, 1].
          rate: images a second since the last evaluation.
        """
        if math.isnan(loss):
            return
        if self._bar is not None:
            self._bar.update(
                self._task,
                completed=step,
                loss=f"{loss:.3f}",
                accuracy=f"{accuracy:.1%}",
                rate=f"{rate:,.0f}",
            )
            return
        now = time.monotonic()
        if now - self._last_line_time < _PLAIN_INTERVAL:
            return
        self._last_line_time = now
        self.say(
            f"{self._name}  step {step}/{self._total_steps}  loss {loss:.3f}  "
            f"accuracy {accuracy:.1%}  {rate:,.0f} images/s"
        )

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _live_bar(console: rich.console.Console) -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("loss {task.fields[loss]}"),
        rich.progress.TextColumn("accuracy {task.fields[accuracy]}"),
        rich.progress.TextColumn("{task.fields[rate]} images/s"),
        rich.progress.TextColumn("ETA"),
        rich.progress.TimeRemainingColumn(),
        console=console,
    )
