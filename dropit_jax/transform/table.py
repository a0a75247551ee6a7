"""Prints a plan as a table."""

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from dropit_jax.transform.plan import Plan

_HEADER = ("bytes", "plain", "type", "class", "stored as", "operation", "made by")


def rows(plan: "Plan") -> Iterable[tuple[str, ...]]:
    """Yields one row for all values that differ in nothing but their bytes.

    A row holds the cells of `_HEADER`: bytes summed over the values, then, for example,
    `("2,176", "8,192", "float32[32,64]", "flowing", "8 bits", "mul", "block/mlp")`.
    """
    alike: dict[tuple[str, ...], list[int]] = {}
    for value in plan.values:
        shape = ",".join(map(str, value.shape))
        times = f"{value.turns} x " if value.turns > 1 else ""
        key: tuple[str, ...] = (
            f"{times}{value.dtype}[{shape}]",
            value.kind,
            value.form,
            value.operation,
            value.layer,
        )
        sizes = alike.setdefault(key, [0, 0])
        sizes[0] += value.nbytes
        sizes[1] += value.plain_bytes
    for key, (stored, plain) in alike.items():
        yield f"{stored:,}", f"{plain:,}", *key


def total(plan: "Plan") -> str:
    """Returns the caption: bytes of all residuals, and recomputed operations."""
    ratio = f", {plan.nbytes / plan.plain_bytes:.3f} of it" if plan.plain_bytes else ""
    again = ", ".join(f"{count} {name}" for name, count in plan.recomputed)
    return (
        f"stored: {plan.nbytes:,} bytes{ratio}; plain function: {plan.plain_bytes:,}\n"
        f"computed again: {again or 'nothing'}"
    )


def rich(plan: "Plan") -> Table:
    """Returns the table for `rich` to print."""
    caption = Text(total(plan))
    table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    for place, name in enumerate(_HEADER):
        table.add_column(
            name, justify="right" if place < 2 else "left", overflow="fold"
        )
    for row in rows(plan):
        table.add_row(*map(Text, row))  # a scope such as "blk[a]" is no markup
    return table


def text(plan: "Plan") -> str:
    """Returns the table as text.

    It fits the width of the terminal; where stdout is no terminal, no cell is folded.
    """
    width = None if sys.stdout.isatty() else _WIDEST
    console = Console(color_system=None, width=width)
    with console.capture() as captured:
        console.print(rich(plan))
    lines = captured.get().splitlines()
    return "\n".join(line.rstrip() for line in lines).strip("\n")


_WIDEST = 10_000
