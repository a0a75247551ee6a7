"""The figures of `benchmarks.scaling`."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # writes files, opens no window
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import ScalarFormatter

from benchmarks.printing.styles import COLOURS, MARKERS
from benchmarks.workloads.sharded import OnDevices
from benchmarks.workloads.sweeps import VARIANTS, Fit, Point, Sweep
from train.reports import png


def draw(
    sweep: Sweep, points: Sequence[Point], lines: Sequence[Fit], path: Path
) -> None:
    """Draws a sweep's points and lines into a PNG file."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, of in zip(axes, ("step", "added"), strict=True):
        for line in (line for line in lines if line.of == of):
            own = [point for point in points if point.variant == line.variant]
            _draw_line(axis, own, line)
        axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    axes[0].set(xlabel=sweep.axis, ylabel="time of a step (ms)", title=sweep.title)
    axes[1].set(
        xlabel="elements compressed (10⁶)",
        ylabel="added to plain Flax (ms)",
        title="Median, quartiles, and line of least squares",
    )
    axes[0].legend()
    axes[1].legend()
    png.save(figure, path)


def _draw_line(axis: Axes, points: Sequence[Point], line: Fit) -> None:
    colour, marker = COLOURS[line.variant], MARKERS[line.variant]
    if line.of == "step":
        unit = 1.0
        x = np.array([point.cost for point in points], float)
        y = [1000 * point.median_s for point in points]
        axis.plot(x, y, marker, color=colour, label=line.variant)
    else:
        unit = 1e6
        x = np.array([point.elements for point in points]) / unit
        y = [1000 * point.added_s.median for point in points]
        error = [
            [1000 * (point.added_s.median - point.added_s.low) for point in points],
            [1000 * (point.added_s.high - point.added_s.median) for point in points],
        ]
        label = f"{line.variant} (R² {line.r_squared:.3f})"
        axis.errorbar(x, y, error, fmt=marker, color=colour, label=label)
    ends = np.array([0, x.max()])
    fitted = 1000 * (line.slope * unit * ends + line.intercept)
    axis.plot(ends, fitted, "--", color=colour, linewidth=1)


def draw_devices(results: Sequence[OnDevices], path: Path) -> None:
    """Draws the collectives and the bytes on each device into a PNG file."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    panels: tuple[tuple[str, Callable[[OnDevices], float]], ...] = (
        ("collectives in a step", lambda r: sum(r.collectives.values())),
        ("residuals on a device (MiB)", lambda r: r.residual_bytes * 2**-20),
        ("temporaries on a device (MiB)", lambda r: r.temp_bytes * 2**-20),
    )
    for axis, (label, value) in zip(axes, panels, strict=True):
        for number, variant in enumerate(VARIANTS):
            own = [result for result in results if result.variant == variant]
            # The largest markers first: where values are equal, all remain visible.
            axis.plot(
                [result.devices for result in own],
                [value(result) for result in own],
                color=COLOURS[variant],
                marker=MARKERS[variant],
                markersize=12 - 3 * number,
                linewidth=4 - number,
                label=variant,
            )
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted({result.devices for result in results}))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
        axis.set(xlabel=f"devices, batch {results[0].batch_per_device} on each")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    png.save(figure, path)
