"""Metrics of a run, one row per evaluation, as a CSV file and TensorBoard events."""

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
    """Raised when metrics cannot be written or read."""


class Records:
    """Writes rows of metrics to `metrics.csv` and `tensorboard/` in the workdir.

    Used in a `with` statement, whose end closes the event file.

    Attributes:
      rows: all rows so far, by step.
    """

    def __init__(
        self,
        workdir: Path,
        step: int,
        saved: Sequence[Row] = (),
        say: Callable[[str], None] = print,
        *,
        write: bool = True,
    ) -> None:
        """Reads the rows up to a step.

        Later rows, which an interrupted run wrote, stay in `metrics.csv` until the next
        row is written.

        Args:
          workdir: working directory of the run.
          step: number of steps done.
          saved: rows up to that step in the checkpoint. Rows that `metrics.csv` lacks
            are written again.
          say: called with a message if rows are written again.
          write: whether to write files; true in only one of several processes.

        Raises:
          RecordsError: the files cannot be written, or `metrics.csv` is damaged.
        """
        self._path = workdir / NAME
        self.rows = [row for row in read(self._path) if row["step"] <= step]
        self._events = None
        if write:
            try:
                self._events = Events(workdir / "tensorboard", step)
            except OSError as error:
                raise RecordsError(f"Cannot write to {workdir}: {error}") from error
        present = {row["step"] for row in self.rows}
        if missing := [row for row in saved if row["step"] not in present]:
            say(
                f"{self._path} lacks {len(missing)} of {len(saved)} rows: they are "
                "restored from the checkpoint."
            )
        for row in missing:
            self.append(row)

    def append(self, row: Row) -> None:
        """Adds a row and writes it to the files.

        Args:
          row: a value for each of `COLUMNS`.

        Raises:
          RecordsError: the row cannot be written.
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
            if error is None:  # otherwise the earlier error is the one to report
                raise RecordsError(f"Cannot write {self._path}: {problem}") from problem


def read(path: Path) -> list[Row]:
    """Returns the rows of a `metrics.csv`; none if the file does not exist.

    Raises:
      RecordsError: the file cannot be read.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="") as file:
            return [_parsed(row) for row in csv.DictReader(file)]
    except Exception as error:  # any type: from the disk, the decoding, the numbers
        reason = text.shorten(error if str(error) else type(error).__name__)
        raise RecordsError(
            f"{path} cannot be read: {reason}. Delete it: the next start of the run "
            "restores it from the last checkpoint."
        ) from error


def _parsed(row: dict[str, str]) -> Row:
    if absent := [name for name in COLUMNS if row.get(name) is None]:
        raise ValueError(f"a row lacks {', '.join(absent)}")
    integers = ("step", "epoch")
    return {
        name: int(row[name]) if name in integers else float(row[name])
        for name in COLUMNS
    }
