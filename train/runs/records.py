"""The metrics of a run, one row an evaluation: a CSV file and TensorBoard events."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from train.runs.events import Events
from train.system import tables, text
from train.system.files import write_atomically

NAME = "metrics.csv"
COLUMNS = (
    "step",
    "epoch",
    "learning_rate",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "test_top5_accuracy",
    "images_per_second",
    "data_wait",
)

Row = dict[str, float]


class RecordsError(Exception):
    """Metrics that cannot be written or read."""


class Records:
    """The rows so far, in the workdir's `metrics.csv` and `tensorboard/`."""

    def __init__(
        self,
        workdir: Path,
        step: int,
        saved: Sequence[Row] = (),
        say: Callable[[str], None] = print,
        *,
        write: bool = True,
    ) -> None:
        """Goes on from a step: later rows, of a run that was cut off, are dropped.

        Args:
          workdir: of the run.
          step: how many steps have been done.
          saved: the rows up to that step, as the checkpoint has them. Those that the
            files lack are written again.
          say: is told of these.
          write: whether to write; one of several processes does.

        Raises:
          RecordsError: nothing can be written there, or what is there is damaged.
        """
        self._path = workdir / NAME
        self.rows = [row for row in read(self._path) if row["step"] <= step]
        self._events = None
        if write:
            try:
                self._events = Events(workdir / "tensorboard", step)
            except OSError as error:
                raise RecordsError(f"Cannot write to {workdir}: {error}") from error
        there = {row["step"] for row in self.rows}
        if lost := [row for row in saved if row["step"] not in there]:
            say(
                f"{self._path} lacks {len(lost)} of {len(saved)} rows: they are "
                "restored from the checkpoint."
            )
        for row in lost:
            self.append(row)

    def append(self, row: Row) -> None:
        """Adds a row, of the values for `COLUMNS`.

        Raises:
          RecordsError: it cannot be written.
        """
        self.rows = sorted([*self.rows, row], key=lambda row: row["step"])
        if self._events is None:
            return
        try:
            write_atomically(self._path, tables.to_csv(COLUMNS, self.rows))
            values = [(name, row[name]) for name in COLUMNS[2:]]
            self._events.add(int(row["step"]), values)
        except OSError as error:
            raise RecordsError(f"Cannot write {self._path}: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._events is None:
            return
        try:
            self._events.close()
        except OSError as problem:
            if error is None:  # else there is one to be told already
                raise RecordsError(f"Cannot write {self._path}: {problem}") from problem


def read(path: Path) -> list[Row]:
    """The rows of a `metrics.csv`; none if there is no such file.

    Raises:
      RecordsError: it cannot be read.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="") as file:
            return [_numbers(row) for row in csv.DictReader(file)]
    except Exception as error:  # of many types: of the disk, of text, of numbers
        reason = text.shown(error if str(error) else type(error).__name__)
        raise RecordsError(
            f"{path} cannot be read: {reason}. Delete it: the next start of the run "
            "restores it from the last checkpoint."
        ) from error


def _numbers(row: dict[str, str]) -> Row:
    if missing := [name for name in COLUMNS if row.get(name) is None]:
        raise ValueError(f"a row lacks {', '.join(missing)}")
    whole = ("step", "epoch")
    return {
        name: int(row[name]) if name in whole else float(row[name]) for name in COLUMNS
    }
