"""Arguments, tables and JSON of the commands."""

import argparse
import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

from train.system import tables


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m benchmarks.NAME`, which has `--json`.

    Args:
      name: of the module.
      doc: its docstring, of which the first line says what it does.
    """
    description = (doc or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog=f"benchmarks.{name}", description=description)
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    return parser


def add_models(
    parser: argparse.ArgumentParser, models: Iterable[str], default: str = "all"
) -> None:
    """Adds `--model` to the arguments of a command.

    Args:
      parser: of the command.
      models: the names that it takes.
      default: the models that are meant where none is named, in words.
    """
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        help=f"one of {', '.join(map(repr, models))}; may be repeated; "
        f"default: {default}",
    )


def chosen(what: str, names: Iterable[str], known: Iterable[str]) -> list[str]:
    """The known names that are asked for, in the order in which they are known.

    Args:
      what: what they name.
      names: those asked for; none: all.
      known: all that there are.

    Raises:
      ValueError: one is not known.
    """
    names, known = list(names), list(known)
    for name in names:
        if name not in known:
            raise ValueError(
                f"unknown {what} {name!r}; known are {', '.join(map(repr, known))}"
            )
    return [name for name in known if not names or name in names]


def machine(device: str) -> str:
    """The machine as tables name it, given the kind of device."""
    return f"cpu ({os.cpu_count()} cores)" if device == "cpu" else device


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown.

    Args:
      title: above it; empty: none.
      header: of the columns.
      rows: of as many cells each.
    """
    lines = tables.to_markdown(header, rows)
    return "\n".join([title, "", *lines] if title else lines)


def to_json(results: Iterable[Any]) -> str:
    """Dataclasses as a list of objects."""
    return json.dumps([dataclasses.asdict(result) for result in results], indent=2)
