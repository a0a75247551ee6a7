"""The position of a run, which its checkpoints hold beside the state."""

import dataclasses
from typing import Any, Self

from train.engine.meter import FIELDS
from train.runs.records import COLUMNS, Row


@dataclasses.dataclass(frozen=True)
class Position:
    """All that a run needs, beside its state, to go on.

    Attributes:
      meter: the sums of the epoch under way, as `Meter.state` gives them.
      train_examples: how many there are.
      rows: of `metrics.csv`, so far.
    """

    meter: dict[str, float]
    train_examples: int
    rows: list[Row]

    def to_json(self) -> dict[str, Any]:
        """Returns the position as `from_json` takes it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Any) -> Self:
        """The position in what a checkpoint has; other fields are left out.

        Raises:
          ValueError: a field is missing or of another type.
        """
        if not isinstance(content, dict):
            raise ValueError("The position is no table")
        # The first checkpoints had no rows.
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
    """Returns what is wrong with the position of a checkpoint; empty if nothing is."""
    try:
        Position.from_json(content)
    except ValueError as error:
        return str(error)
    return ""


def _has_numbers(section: Any, names: tuple[str, ...]) -> bool:
    return isinstance(section, dict) and all(
        isinstance(section.get(name), int | float) for name in names
    )


def _is_row(row: Any) -> bool:
    return _has_numbers(row, COLUMNS) and all(
        map(_is_count, (row["step"], row["epoch"]))
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
