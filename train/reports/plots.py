"""Draws figures of training runs as PNG files."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws into files, without a display
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from train.reports import palette, png
from train.reports.histograms import MOMENTS, PARTS, Distributions
from train.reports.summary import Mean
from train.runs.records import Row

_LABELS = {"flax": "Flax", "dropit": "DropIT"}
_AXIS_LABELS = {"loss": "cross-entropy (nats)", "accuracy": "accuracy"}
_COLUMNS = 4
_BINS = 80


def curves(runs: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Draws loss and accuracy of two runs over their epochs.

    Training is dotted, testing solid.

    Args:
      runs: rows of `metrics.csv`, by variant, "flax" or "dropit".
      path: path of the PNG file.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, metric in zip(axes, _AXIS_LABELS, strict=True):
        for name, rows in runs.items():
            epochs = [row["epoch"] for row in rows]
            for part, style in (("train", ":"), ("test", "-")):
                axis.plot(
                    epochs,
                    [row[f"{part}_{metric}"] for row in rows],
                    style,
                    color=palette.colour_of(name, "flax"),
                    label=f"{_LABELS[name]}, {part}",
                )
        axis.set_xlabel("epoch")
        axis.set_ylabel(_AXIS_LABELS[metric])
        axis.grid(alpha=0.3)
    axes[0].set_ylim(bottom=0)
    axes[1].set_ylim(0, 1)
    axes[1].legend()
    png.save(figure, path)


def against_baseline(
    runs: Mapping[str, Sequence[Sequence[Row]]], baseline: str, metric: str, path: Path
) -> None:
    """Draws each variant in a panel of its own, together with the baseline.

    A line is the mean over the runs, a band reaches from their minimum to their
    maximum. Training is dotted, testing solid.

    Args:
      runs: by variant, a run for each seed; of each run, the rows of `metrics.csv`.
        All runs of a variant have rows of the same steps.
      baseline: the variant that is in all panels.
      metric: "loss" or "accuracy".
      path: path of the PNG file.
    """
    others = [name for name in runs if name != baseline]
    figure, axes = _panels(len(others))
    for axis, name in zip(axes, others, strict=True):
        for variant in (baseline, name):
            colour = palette.colour_of(variant, baseline)
            for part, style in (("train", ":"), ("test", "-")):
                label = f"{'baseline' if variant == baseline else 'variant'}, {part}"
                _band(axis, runs[variant], f"{part}_{metric}", colour, style, label)
        axis.set_title(name, fontsize=9)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.supxlabel("step")
    figure.supylabel(_AXIS_LABELS[metric])
    png.save(figure, path)


def histograms(
    distributions: Mapping[str, Distributions], baseline: str, path: Path
) -> None:
    """Draws histograms of parameters and gradients before and after training.

    A panel shows one variant together with the baseline, and their finite elements.

    Args:
      distributions: the distributions of the variants and of the baseline, by name.
      baseline: the variant that is in all panels.
      path: path of the PNG file.
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
                each: _finite(distributions[each][layer][part, moment])
                for each in dict.fromkeys((baseline, name))
            }
            reach = max(np.abs(value).max(initial=0.0) for value in values.values())
            edges = np.linspace(-reach, reach, _BINS + 1) if reach else _BINS
            for each, value in values.items():
                counts, at = np.histogram(value, edges)
                axis.stairs(
                    counts, at, color=palette.colour_of(each, baseline), label=each
                )
            axis.set_yscale("symlog")
            axis.xaxis.set_major_locator(MaxNLocator(5))
            axis.set_title(f"{part} of {layer}, {moment}", fontsize=8)
            axis.grid(alpha=0.3)
    for axis in axes[0][:: len(MOMENTS)]:
        axis.legend(fontsize=8)
    figure.supylabel("elements")
    png.save(figure, path)


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def tradeoff(
    points: Mapping[str, tuple[float, Mean]],
    baseline: str,
    labels: tuple[str, str],
    path: Path,
) -> None:
    """Draws cost and gain of each variant, the lowest cost at the bottom.

    Costs are bars on the left; gains are points with standard errors on the right, with
    a line at 0.

    Args:
      points: (cost, gain), by variant.
      baseline: the variant that gains are measured against.
      labels: axis labels of costs and of gains.
      path: path of the PNG file.
    """
    names = sorted(points, key=lambda name: points[name][0])
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 1 + 0.28 * len(names)), layout="constrained", sharey=True
    )
    right.axvline(0, color="0.5", linewidth=0.8)
    for name in names:
        cost, gain = points[name]
        colour = palette.colour_of(name, baseline)
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
    colour: str,
    style: str,
    label: str,
) -> None:
    """Draws a column of rows: its mean over the runs, and its range as a band.

    A single run has no band.
    """
    steps = [row["step"] for row in runs[0]]
    values = np.array([[row[column] for row in rows] for rows in runs])
    axis.plot(steps, values.mean(axis=0), style, color=colour, label=label)
    if len(runs) > 1:
        axis.fill_between(
            steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2
        )


def _panels(count: int) -> tuple[Any, list[Any]]:
    """Returns a figure and `count` axes in a grid; further places stay empty."""
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
