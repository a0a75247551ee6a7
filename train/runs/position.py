"""The position of a run: the part of a checkpoint that is not on the devices."""

import dataclasses
from typing import Any, Self

from train.engine.meter import FIELDS
from train.runs.records import COLUMNS, Row


@dataclasses.dataclass(frozen=True)
class Position:
    """Holds all that a run needs, besides its state on the devices, to go on.

    Attributes:
      meter: sums since the last evaluation, as `Meter.state` returns them.
      train_examples: number of training examples in the dataset.
      rows: rows of `metrics.csv` so far.
    """

    meter: dict[str, float]
    train_examples: int
    rows: list[Row]

    def to_json(self) -> dict[str, Any]:
        """Returns the position as a dict that JSON can represent."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Any) -> Self:
        """Returns the position in parsed JSON, such as `to_json` returns.

        Args:
          content: the parsed JSON. Unknown fields are ignored; without `rows`, there
            are none.

        Raises:
          ValueError: another field is missing, or a field is of the wrong type or a
            negative count.
        """
        if not isinstance(content, dict):
            raise ValueError("The position is no table")
        # Checkpoints of early versions had no rows.
        fields = {"rows": [], **content}
        meter: Any = fields.get("meter")
        examples: Any = fields.get("train_examples")
        rows: Any = fields["rows"]
        if not _has_numbers(meter, FIELDS):
            raise ValueError("The position has no sums of the epoch, `meter`")
        if not _is_count(examples):
            raise ValueError("The position has no number of `train_examples`")
        if not (isinstance(rows, list) and all(map(_is_row, rows))):
            raise ValueError("The position has no `rows` of metrics")
        return cls(meter, examples, rows)


def problem(content: Any) -> str:
    """Returns a description of the fault in a checkpoint's position, or "" if none."""
    try:
        Position.from_json(content)
    except ValueError as error:
        return str(error)
    return ""


def _has_numbers(section: Any, names: tuple[str, ...]) -> bool:
    return isinstance(section, dict) and all(
        isinstance(section.get(name), int | float)
        and not isinstance(section[name], bool)
        for name in names
    )


def _is_row(row: Any) -> bool:
    return _has_numbers(row, COLUMNS) and all(
        map(_is_count, (row["step"], row["epoch"]))
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
