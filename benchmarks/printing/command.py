"""The arguments, tables and JSON that the commands have in common."""

import argparse
import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

from train.system import tables


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Returns the parser of `python -m benchmarks.NAME`, with the argument `--json`.

    Args:
      name: the name of the module.
      doc: the docstring of the module; its first line is the description.
    """
    description = (doc or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog=f"benchmarks.{name}", description=description)
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    return parser


def add_models(
    parser: argparse.ArgumentParser, models: Iterable[str], default: str = "all"
) -> None:
    """Adds the argument `--model`.

    Args:
      parser: the parser of the command.
      models: the names of the models.
      default: the default, in words for the help.
    """
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        help=f"one of {', '.join(map(repr, models))}; may be repeated; "
        f"default: {default}",
    )


def chosen(what: str, names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Returns the known names that were asked for, in the order of `known`.

    Args:
      what: the kind of thing that has these names, for the error message.
      names: the names asked for; all if empty.
      known: all names.

    Raises:
      ValueError: a name is not known.
    """
    names, known = list(names), list(known)
    for name in names:
        if name not in known:
            raise ValueError(
                f"unknown {what} {name!r}; known are {', '.join(map(repr, known))}"
            )
    return [name for name in known if not names or name in names]


def machine(device: str) -> str:
    """Returns the name of the machine in tables, from the kind of its device."""
    return f"cpu ({os.cpu_count()} cores)" if device == "cpu" else device


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table.

    Args:
      title: the line above the table; empty for none.
      header: the names of the columns.
      rows: the cells of each row.
    """
    lines = tables.to_markdown(header, rows)
    return "\n".join([title, "", *lines] if title else lines)


def to_json(results: Iterable[Any]) -> str:
    """Returns dataclasses as a JSON list of objects."""
    return json.dumps([dataclasses.asdict(result) for result in results], indent=2)
