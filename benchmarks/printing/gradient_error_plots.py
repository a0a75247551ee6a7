"""The figures of `benchmarks.gradient_error`."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")  # writes files, opens no window
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from train.reports import palette, png

if TYPE_CHECKING:
    from benchmarks.gradient_error import Error

_STYLES = {
    "min-k, D = 16": (palette.VERMILION, "s"),
    "min-k, other D": (palette.PURPLE, "v"),
    "random elements": (palette.SKY, "P"),
    "channels": (palette.BLACK, "X"),
    "random channels": (palette.GREY, "*"),
    "values of fewer bits": (palette.ORANGE, "D"),
    "mean for the dropped": (palette.BLUE, "o"),
    "nothing dropped": (palette.GREEN, "^"),
}


def front(errors: Sequence["Error"], best: Sequence["Error"], path: Path) -> None:
    """Draws each policy's error against its bits, with the front, into a PNG file.

    Raises:
      KeyError: a family has no colour.
    """
    figure, axis = plt.subplots(figsize=(9, 6.5), layout="constrained")
    families = dict.fromkeys(each.family for each in errors)
    for family, (colour, marker) in ((name, _STYLES[name]) for name in families):
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
    for each in best:
        axis.annotate(
            each.policy,
            (each.bits, each.error),
            (-4, -4),
            textcoords="offset points",
            fontsize=6,
            ha="right",
            va="top",
            rotation=30,
            rotation_mode="anchor",
        )
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("cached bits an element")
    _label_errors(axis)
    png.save(figure, path)


def chunks(errors: Sequence["Error"], path: Path) -> None:
    """Draws min-k's error and time against D, a line for each rate, into a PNG file."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    lines: dict[str, dict[str, Error]] = {}
    for each in errors:
        if found := re.fullmatch(r"(\S+%) D=(\w+)", each.policy):
            lines.setdefault(found[1], {})[found[2]] = each
    colour_map = matplotlib.colormaps["viridis"]
    for number, (rate, line) in enumerate(lines.items()):
        # Rates have an order, which the colours of variants do not show.
        colour = colour_map(0.9 * number / max(1, len(lines) - 1))
        for axis, values in (
            (axes[0], [each.error for each in line.values()]),
            (axes[1], [each.compress_ns for each in line.values()]),
        ):
            axis.plot(list(line), values, "o-", color=colour, label=f"rate {rate}")
    for axis in axes:
        axis.set_xlabel("D, elements of a chunk")
    _label_errors(axes[0])
    axes[1].set_ylabel("time to compress here, ns an element")
    axes[1].set_ylim(bottom=0)
    axes[1].grid(alpha=0.3)
    png.save(figure, path)


def _label_errors(axis: Axes) -> None:
    axis.set_yscale("log")
    axis.set_ylabel("relative error of the weight gradient")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
