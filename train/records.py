"""The metrics of a run, one row an evaluation: a CSV file and TensorBoard events."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import tensorboardX

from train import tables
from train.files import write_atomically

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
                self._events = tensorboardX.SummaryWriter(
                    str(workdir / "tensorboard"), purge_step=step + 1
                )
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
            for name in COLUMNS[2:]:
                self._events.add_scalar(name, row[name], int(row["step"]))
            self._events.flush()
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
    except (OSError, TypeError, ValueError) as error:
        raise RecordsError(f"{path} cannot be read: {error}") from error


def _numbers(row: dict[str, str]) -> Row:
    whole = ("step", "epoch")
    return {
        name: int(text) if name in whole else float(text) for name, text in row.items()
    }
