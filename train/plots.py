"""Figures of training runs."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files, no window
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from train import colours, figures
from train.histograms import MOMENTS, PARTS, Distributions
from train.records import Row

_LABELS = {"flax": "Flax", "dropit": "DropIT"}
_AXES = {"loss": "cross-entropy (nats)", "accuracy": "accuracy"}
_COLUMNS = 4
_BINS = 80


def curves(runs: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Draws loss and accuracy of several runs over their epochs into a PNG file.

    Args:
      runs: the rows of `metrics.csv` of each variant.
      path: where the figure goes.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, metric in zip(axes, _AXES, strict=True):
        for name, rows in runs.items():
            epochs = [row["epoch"] for row in rows]
            for part, style in (("train", ":"), ("test", "-")):
                axis.plot(
                    epochs,
                    [row[f"{part}_{metric}"] for row in rows],
                    style,
                    color=colours.of(name),
                    label=f"{_LABELS[name]}, {part}",
                )
        axis.set_xlabel("epoch")
        axis.set_ylabel(_AXES[metric])
        axis.grid(alpha=0.3)
    axes[0].set_ylim(bottom=0)
    axes[1].set_ylim(0, 1)
    axes[1].legend()
    figures.save(figure, path)


def against_baseline(
    runs: Mapping[str, Sequence[Sequence[Row]]], baseline: str, metric: str, path: Path
) -> None:
    """Draws each variant in a panel of its own, over the baseline.

    Args:
      runs: of each variant, the rows of its runs, one for each seed; a line is their
        mean, a band from the least to the greatest of them.
      baseline: the variant that all panels have.
      metric: "loss" or "accuracy"; training is dotted, testing solid.
      path: where the figure goes.
    """
    others = [name for name in runs if name != baseline]
    figure, axes = _panels(len(others))
    for axis, name in zip(axes, others, strict=True):
        for variant in (baseline, name):
            for part, style in (("train", ":"), ("test", "-")):
                _band(axis, runs[variant], f"{part}_{metric}", variant, style)
        axis.set_title(name, fontsize=9)
        axis.grid(alpha=0.3)
    axes[0].legend(
        [f"{baseline}, training", f"{baseline}, test", "training", "test"], fontsize=7
    )
    figure.supxlabel("step")
    figure.supylabel(_AXES[metric])
    figures.save(figure, path)


def histograms(distributions: Mapping[str, Distributions], path: Path) -> None:
    """Draws parameters and gradients at the beginning and the end of training.

    Args:
      distributions: of each variant.
      path: where the figure goes.
    """
    layers = list(next(iter(distributions.values())))
    rows = [(layer, part) for part in PARTS for layer in layers]
    figure, axes = plt.subplots(
        len(rows),
        len(MOMENTS),
        figsize=(9, 1.7 * len(rows)),
        layout="constrained",
        squeeze=False,
    )
    for (layer, part), line in zip(rows, axes, strict=True):
        for moment, axis in zip(MOMENTS, line, strict=True):
            values = {
                name: each[layer][part, moment] for name, each in distributions.items()
            }
            reach = max(float(np.abs(value).max()) for value in values.values())
            edges = np.linspace(-reach, reach, _BINS + 1) if reach else _BINS
            for name, value in values.items():
                counts, at = np.histogram(value, edges)
                axis.stairs(counts, at, color=colours.of(name), label=name)
            axis.set_yscale("symlog")
            axis.xaxis.set_major_locator(MaxNLocator(5))
            axis.set_title(f"{part} of {layer}, {moment}", fontsize=8)
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.supylabel("elements")
    figures.save(figure, path)


def tradeoff(
    points: Mapping[str, tuple[float, float, float]],
    labels: tuple[str, str],
    baseline: str,
    path: Path,
) -> None:
    """Draws a row for each name, the least x first, into a PNG file.

    Args:
      points: x, y, and the error of y, which is NaN where there is none.
      labels: of x, drawn as bars on the left, and of y, as points on the right.
      baseline: the name whose y all rows are seen against.
      path: where the figure goes.
    """
    names = sorted(points, key=lambda name: points[name][0], reverse=True)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 1 + 0.28 * len(names)), layout="constrained", sharey=True
    )
    for name in names:
        x, y, error = points[name]
        left.barh(name, x, color=colours.of(name))
        bar = None if math.isnan(error) else error
        right.errorbar(y, name, xerr=bar, fmt="o", color=colours.of(name), capsize=3)
    right.axvline(points[baseline][1], color=colours.of(baseline), linewidth=0.8)
    for axis, label in zip((left, right), labels, strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3, axis="x")
    figures.save(figure, path)


def _band(
    axis: Any, runs: Sequence[Sequence[Row]], column: str, variant: str, style: str
) -> None:
    steps = [row["step"] for row in runs[0]]
    values = np.array([[row[column] for row in rows] for rows in runs])
    colour = colours.of(variant)
    axis.plot(steps, values.mean(axis=0), style, color=colour)
    if len(runs) > 1:
        axis.fill_between(
            steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2
        )


def _panels(count: int) -> tuple[Any, list[Any]]:
    columns = max(1, min(count, _COLUMNS))
    lines = max(1, math.ceil(count / columns))
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(3 * columns, 2.2 * lines),
        sharex=True,
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    every = list(axes.flat)
    for axis in every[count:]:
        axis.set_axis_off()
    return figure, every[:count]
