"""Tables as text, in CSV and in Markdown."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def to_csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Returns a table in CSV; cells for columns that a row lacks are empty.

    Raises:
      ValueError: a row has a column that is not in `columns`.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Returns the lines of a Markdown table; each row has as many cells as `header`."""
    all_rows = (header, ["---"] * len(header), *rows)
    return [f"| {' | '.join(cells)} |" for cells in all_rows]
