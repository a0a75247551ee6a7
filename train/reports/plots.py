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

from train.reports import palette, png
from train.reports.histograms import MOMENTS, PARTS, Distributions
from train.reports.summary import Mean
from train.runs.records import Row

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
                    color=palette.of(name),
                    label=f"{_LABELS[name]}, {part}",
                )
        axis.set_xlabel("epoch")
        axis.set_ylabel(_AXES[metric])
        axis.grid(alpha=0.3)
    axes[0].set_ylim(bottom=0)
    axes[1].set_ylim(0, 1)
    axes[1].legend()
    png.save(figure, path)


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
                label = f"{'baseline' if variant == baseline else 'variant'}, {part}"
                _band(axis, runs[variant], f"{part}_{metric}", variant, style, label)
        axis.set_title(name, fontsize=9)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.supxlabel("step")
    figure.supylabel(_AXES[metric])
    png.save(figure, path)


def histograms(
    distributions: Mapping[str, Distributions], baseline: str, path: Path
) -> None:
    """Draws parameters and gradients at the beginning and the end of training.

    Args:
      distributions: of the baseline and of others, of each in panels of its own, over
        the baseline's.
      baseline: the one that all panels have.
      path: where the figure goes.
    """
    others = [name for name in distributions if name != baseline] or [baseline]
    layers = list(distributions[baseline])
    rows = [(layer, part) for part in PARTS for layer in layers]
    columns = [(name, moment) for name in others for moment in MOMENTS]
    figure, axes = plt.subplots(
        len(rows),
        len(columns),
        figsize=(1 + 3.2 * len(columns), 1.7 * len(rows)),
        layout="constrained",
        squeeze=False,
    )
    for (layer, part), line in zip(rows, axes, strict=True):
        for (name, moment), axis in zip(columns, line, strict=True):
            values = {
                each: distributions[each][layer][part, moment]
                for each in dict.fromkeys((baseline, name))
            }
            reach = max(float(np.abs(value).max()) for value in values.values())
            edges = np.linspace(-reach, reach, _BINS + 1) if reach else _BINS
            for each, value in values.items():
                counts, at = np.histogram(value, edges)
                axis.stairs(counts, at, color=palette.of(each), label=each)
            axis.set_yscale("symlog")
            axis.xaxis.set_major_locator(MaxNLocator(5))
            axis.set_title(f"{part} of {layer}, {moment}", fontsize=8)
            axis.grid(alpha=0.3)
    for axis in axes[0][:: len(MOMENTS)]:
        axis.legend(fontsize=8)
    figure.supylabel("elements")
    png.save(figure, path)


def tradeoff(
    points: Mapping[str, tuple[float, Mean]],
    labels: tuple[str, str],
    path: Path,
) -> None:
    """Draws a row for each name, the least cost below, into a PNG file.

    Args:
      points: what each costs, and what it gains, of which 0 has a line.
      labels: of the costs, drawn as bars on the left, and of the gains, points on the
        right with their standard errors.
      path: where the figure goes.
    """
    names = sorted(points, key=lambda name: points[name][0])
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 1 + 0.28 * len(names)), layout="constrained", sharey=True
    )
    right.axvline(0, color="0.5", linewidth=0.8)
    for name in names:
        cost, gain = points[name]
        colour = palette.of(name)
        left.barh(name, cost, color=colour)
        bar = None if math.isnan(gain.error) else gain.error
        right.errorbar(gain.mean, name, xerr=bar, fmt="o", color=colour, capsize=3)
    for axis, label in zip((left, right), labels, strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3, axis="x")
    png.save(figure, path)


def _band(
    axis: Any,
    runs: Sequence[Sequence[Row]],
    column: str,
    variant: str,
    style: str,
    label: str,
) -> None:
    steps = [row["step"] for row in runs[0]]
    values = np.array([[row[column] for row in rows] for rows in runs])
    colour = palette.of(variant)
    axis.plot(steps, values.mean(axis=0), style, color=colour, label=label)
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
