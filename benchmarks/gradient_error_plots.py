"""Figures of `benchmarks.gradient_error`."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")  # files, no window
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from train import colours, figures

if TYPE_CHECKING:
    from benchmarks.gradient_error import Error

_STYLES = {
    "min-k, D = 16": (colours.VERMILION, "s"),
    "min-k, other D": (colours.PURPLE, "v"),
    "random elements": (colours.SKY, "P"),
    "channels": (colours.BLACK, "X"),
    "values of fewer bits": (colours.ORANGE, "D"),
    "mean for the dropped": (colours.BLUE, "o"),
    "nothing dropped": (colours.GREEN, "^"),
}


def front(errors: Sequence["Error"], best: Sequence["Error"], path: Path) -> None:
    """Draws each policy's error against its bits, and the front, into a PNG file."""
    figure, axis = plt.subplots(figsize=(8, 5.5), layout="constrained")
    for family, (colour, marker) in _STYLES.items():
        points = [each for each in errors if each.family == family]
        axis.scatter(
            [each.bits for each in points],
            [each.error for each in points],
            28,
            c=colour,
            marker=marker,
            label=family,
            alpha=0.8,
        )
    axis.step(
        [each.bits for each in best],
        [each.error for each in best],
        where="post",
        color="0.4",
        linewidth=1,
        label="the front",
        zorder=0,
    )
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    _finish(figure, axis, "cached bits an element", path)


def chunks(errors: Sequence["Error"], path: Path) -> None:
    """Draws the error of min-k against D, a line a rate, into a PNG file."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    lines: dict[str, dict[str, float]] = {}
    for each in errors:
        if found := re.fullmatch(r"(\S+%) D=(\w+)", each.policy):
            lines.setdefault(found[1], {})[found[2]] = each.error
    shades = (
        colours.BLUE,
        colours.GREEN,
        colours.VERMILION,
        colours.PURPLE,
        colours.BLACK,
    )
    for (rate, line), colour in zip(lines.items(), shades, strict=False):
        axis.plot(
            list(line), list(line.values()), "o-", color=colour, label=f"rate {rate}"
        )
    _finish(figure, axis, "D, elements of a chunk", path)


def _finish(figure: Figure, axis: Axes, xlabel: str, path: Path) -> None:
    axis.set_yscale("log")
    axis.set_xlabel(xlabel)
    axis.set_ylabel("relative error of the weight gradient")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figures.save(figure, path)
