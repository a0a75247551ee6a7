"""What a training step costs against batch, width, depth and number of devices.

`python -m benchmarks.scaling [--part=batch] [--output=docs/figures] [--json]`

Times steps of plain Flax and of the presets in turns, and fits lines to them: a cliff
would be a point far from its line. The axis of each fit is what the work of plain Flax
grows with:

- batch and depth (hidden layers of an MLP) themselves;
- the square of the width: a convolution takes width² multiplications for each pixel,
  while what it caches grows with the width alone.

What a preset adds to a step, its time less plain Flax's in the same round, is fitted
against the elements that it compresses, whatever made these more.

On 1, 2, 4 and 8 simulated devices with the same batch on each, steps are compiled and
not run: two cores would be timed, not eight devices. Counted are the collectives of a
step, and the bytes that are cached and allocated on a device.
"""

import argparse
import collections
import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import matplotlib
import numpy as np
from jax.interpreters import partial_eval
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

matplotlib.use("Agg")  # files, no window
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import ScalarFormatter

from benchmarks import timing, workloads
from benchmarks.colours import COLOURS, MARKERS
from benchmarks.step_time import chosen
from benchmarks.workloads import Workload
from dropit_jax import Preset, memory

# The first is what the others are measured against.
VARIANTS = ("flax", "dropit_16", "lean")

DEVICES = (1, 2, 4, 8)
_DEVICES_FLAG = f"--xla_force_host_platform_device_count={max(DEVICES)}"
_BATCH_PER_DEVICE = 8
_COLLECTIVE = re.compile(
    r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Training steps that differ in one number.

    Attributes:
      name: of that number.
      title: what else they have.
      axis: what the work of plain Flax grows with.
      values: of the number.
      make: the workload of a value.
      cost: the place of a value on the axis.
    """

    name: str
    title: str
    axis: str
    values: tuple[int, ...]
    make: Callable[[int], Workload]
    cost: Callable[[int], int]


SWEEPS = {
    sweep.name: sweep
    for sweep in (
        Sweep(
            "batch",
            "ResNet-18 of width 16, 32²",
            "batch",
            (8, 16, 32, 64),
            lambda batch: workloads.resnet18(16, batch),
            lambda batch: batch,
        ),
        Sweep(
            "width",
            "ResNet-18, 32², batch 16",
            "width²",
            (8, 16, 32, 64),
            lambda width: workloads.resnet18(width, 16),
            lambda width: width**2,
        ),
        Sweep(
            "depth",
            "MLP of 1024 features, batch 256",
            "hidden layers",
            (2, 4, 8, 16),
            workloads.mlp,
            lambda layers: layers,
        ),
    )
}
PARTS = (*SWEEPS, "devices")


@dataclasses.dataclass(frozen=True)
class Point:
    """What one step takes.

    Attributes:
      kind: "point".
      sweep: the number that is varied.
      value: of it.
      cost: the place of the value on the axis of the fit.
      variant: which way of saving memory.
      median_s: seconds a step, the median over the rounds.
      elements: that the variant compresses in a step.
      added_s: seconds more than plain Flax's in the same round.
    """

    kind: str
    sweep: str
    value: int
    cost: int
    variant: str
    median_s: float
    elements: int
    added_s: timing.Spread


@dataclasses.dataclass(frozen=True)
class Fit:
    """A line of least squares through the points of a variant in a sweep.

    Attributes:
      kind: "fit".
      sweep: the number that is varied.
      variant: which way of saving memory.
      of: "step", the time of a step, or "added", what the variant adds to it.
      against: what is on the axis.
      slope: seconds for one more of that.
      intercept: seconds at none of it.
      r_squared: the share of the variance that the line explains.
      largest_deviation: of a point from the line, as a share of the largest value.
    """

    kind: str
    sweep: str
    variant: str
    of: str
    against: str
    slope: float
    intercept: float
    r_squared: float
    largest_deviation: float


@dataclasses.dataclass(frozen=True)
class OnDevices:
    """What a step takes on a number of devices, each with the same part of the batch.

    Attributes:
      kind: "devices".
      devices: how many.
      variant: which way of saving memory.
      batch_per_device: images on each.
      collectives: in the compiled step, by kind.
      cached_bytes: of all arrays that the backward pass is given, on one device; the
        parameters are among them, constants are not.
      temp_bytes: that the compiled step allocates on one device beside arguments and
        results.
    """

    kind: str
    devices: int
    variant: str
    batch_per_device: int
    collectives: dict[str, int]
    cached_bytes: int
    temp_bytes: int


Finding: TypeAlias = Point | Fit | OnDevices


def compressed_elements(workload: Workload, preset: Preset) -> int:
    """Elements of all inputs that a preset's layers compress in a step."""
    if preset.dropit is None or preset.conv is None:
        return 0
    # All of them are cached, in two bytes each, where nothing is dropped.
    whole = {"rate": 0, "value_dtype": "bfloat16"}
    preset = dataclasses.replace(
        preset,
        dropit=dataclasses.replace(preset.dropit, **whole),  # type: ignore[arg-type]
        conv=dataclasses.replace(preset.conv, **whole),  # type: ignore[arg-type]
    )
    step, arguments, _ = workloads.training_step(workload, preset)
    return memory.cached_bytes(step, *arguments) // 2


def measure(sweep: Sweep, rounds: int) -> list[Point]:
    """Times all steps of a sweep in turns."""
    runs = {}
    for value in sweep.values:
        workload = sweep.make(value)
        arguments = workloads.real_arguments(workload)
        for name in VARIANTS:
            preset = workloads.TIMED_VARIANTS[name]
            step, _, _ = workloads.training_step(workload, preset)
            runs[f"{name}, {value}"] = functools.partial(jax.jit(step), *arguments)
    seconds = timing.interleaved(runs, rounds)
    points = []
    for value in sweep.values:
        plain = seconds[f"{VARIANTS[0]}, {value}"]
        for name in VARIANTS:
            own, preset = seconds[f"{name}, {value}"], workloads.TIMED_VARIANTS[name]
            points.append(
                Point(
                    "point",
                    sweep.name,
                    value,
                    sweep.cost(value),
                    name,
                    timing.spread(own).median,
                    compressed_elements(sweep.make(value), preset),
                    timing.spread([a - b for a, b in zip(own, plain, strict=True)]),
                )
            )
    return points


def fits(sweep: Sweep, points: Sequence[Point]) -> list[Fit]:
    """The lines through a sweep's points."""
    found = []
    for name in VARIANTS:
        own = [point for point in points if point.variant == name]
        costs, times = [p.cost for p in own], [p.median_s for p in own]
        found.append(_fit(sweep, name, "step", sweep.axis, costs, times))
    for name in VARIANTS[1:]:
        own = [point for point in points if point.variant == name]
        elements, added = [p.elements for p in own], [p.added_s.median for p in own]
        found.append(_fit(sweep, name, "added", "elements", elements, added))
    return found


def _fit(
    sweep: Sweep,
    variant: str,
    of: str,
    against: str,
    x: Sequence[float],
    y: Sequence[float],
) -> Fit:
    values = np.asarray(y)
    slope, intercept = np.polyfit(x, values, 1)
    off = values - (slope * np.asarray(x) + intercept)
    variance = float(np.sum((values - values.mean()) ** 2))
    largest = float(np.abs(values).max())
    return Fit(
        "fit",
        sweep.name,
        variant,
        of,
        against,
        float(slope),
        float(intercept),
        r_squared=1 - float(np.sum(off**2)) / variance if variance else 1.0,
        largest_deviation=float(np.abs(off).max() / largest) if largest else 0.0,
    )


def on_devices(
    workload: Workload, variant: str, count: int, batch_per_device: int
) -> OnDevices:
    """Compiles a step for a number of devices that share the batch."""
    mesh = jax.make_mesh(
        (count,), ("data",), (AxisType.Auto,), devices=jax.devices()[:count]
    )
    everywhere, shared = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    preset = workloads.TIMED_VARIANTS[variant]
    batch = count * batch_per_device
    step, arguments, _ = workloads.training_step(workload, preset, batch)
    jitted = jax.jit(
        step,
        in_shardings=(everywhere, everywhere, shared, shared),
        out_shardings=everywhere,
    )
    compiled = jitted.lower(*arguments).compile()
    variables, _, images, _ = arguments
    backward = functools.partial(_backward, workload.make(preset))
    return OnDevices(
        "devices",
        count,
        variant,
        batch_per_device,
        collectives(compiled.as_text() or ""),
        bytes_a_device(backward, (variables, images), (everywhere, shared)),
        memory.memory_stats(compiled)["temp_bytes"],
    )


def _backward(model: Any, variables: Any, images: jax.Array) -> Any:
    """What the backward pass of a model is given: a function, and the arrays in it."""

    def forward(params: Any) -> Any:
        given = variables | {"params": params}
        return model.apply(given, images, True, mutable=["batch_stats"])

    return jax.vjp(forward, variables["params"])[1]


def collectives(program: str) -> dict[str, int]:
    """How often each kind of collective is in a compiled program."""
    return dict(sorted(collections.Counter(_COLLECTIVE.findall(program)).items()))


def bytes_a_device(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    shardings: Sequence[NamedSharding],
) -> int:
    """Bytes on one device of what a function computes, as the compiler shards that.

    Results that depend on no argument, such as zeros, do not count: where the function
    is part of a program, nothing holds them.

    Args:
      function: of arrays; it does not run.
      arguments: arrays or `jax.ShapeDtypeStruct`s.
      shardings: of each of these.
    """
    jitted = jax.jit(function, in_shardings=tuple(shardings))
    results = jax.tree.leaves(jitted.lower(*arguments).compile().out_info)
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, counts in zip(results, _depends(function, arguments), strict=True)
        if counts
    )


def _depends(function: Callable[..., Any], arguments: Sequence[Any]) -> list[bool]:
    """Of each result, whether any argument has an influence on it."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    count = len(jaxpr.outvars)
    inputs = (
        partial_eval.dce_jaxpr(jaxpr, [i == result for i in range(count)])[1]
        for result in range(count)
    )
    return [any(used) for used in inputs]


def measure_devices(
    workload: Workload,
    counts: Sequence[int] = DEVICES,
    batch_per_device: int = _BATCH_PER_DEVICE,
) -> list[OnDevices]:
    """Compiles every variant of a step for every number of devices."""
    return [
        on_devices(workload, variant, count, batch_per_device)
        for count in counts
        for variant in VARIANTS
    ]


def _in_a_process_with_devices() -> list[OnDevices]:
    """`measure_devices` where there are as many, simulated on the CPU.

    That is set before JAX starts; and steps are timed where nothing is simulated.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES_FLAG}"
    command = [sys.executable, "-m", "benchmarks.scaling", "--part=devices"]
    done = subprocess.run(
        [*command, "--json", "--output="],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        check=True,
    )
    return [OnDevices(**each) for each in json.loads(done.stdout)]


def markdown(sweep: Sweep, points: Sequence[Point], lines: Sequence[Fit]) -> str:
    """A sweep's points and lines, as two tables."""
    rows = [
        [
            str(point.value),
            point.variant,
            f"{1000 * point.median_s:,.1f}",
            f"{1e-6 * point.elements:,.2f}",
            f"{1000 * point.added_s.median:,.1f} [{1000 * point.added_s.low:,.1f}, "
            f"{1000 * point.added_s.high:,.1f}]",
        ]
        for point in points
    ]
    header = [sweep.name, "variant", "step ms", "10⁶ elements compressed", "added ms"]
    text = _table(f"### {sweep.name}: {sweep.title}", header, rows)
    rows = [
        [
            line.of,
            line.variant,
            line.against,
            *_scaled_slope(line),
            f"{1000 * line.intercept:,.1f}",
            f"{line.r_squared:.4f}",
            f"{line.largest_deviation:.1%}",
        ]
        for line in lines
    ]
    header = ["line of", "variant", "against", "slope", "unit", "ms at none", "R²"]
    return text + "\n\n" + _table("", [*header, "largest deviation"], rows).lstrip()


def _scaled_slope(line: Fit) -> tuple[str, str]:
    if line.of == "added":
        return f"{1e9 * line.slope:,.2f}", "ns an element"
    return f"{1000 * line.slope:,.3f}", f"ms, by {line.against}"


def devices_markdown(results: Sequence[OnDevices]) -> str:
    """What devices take, as a table."""
    rows = [
        [
            str(result.devices),
            result.variant,
            ", ".join(f"{n} {kind}" for kind, n in result.collectives.items()) or "0",
            f"{result.cached_bytes * 2**-20:,.2f}",
            f"{result.temp_bytes * 2**-20:,.2f}",
        ]
        for result in results
    ]
    header = ["devices", "variant", "collectives", "cached MiB", "temp MiB"]
    title = (
        f"### Devices: {SWEEPS['batch'].title}, batch {results[0].batch_per_device} on "
        "each, bytes on one of them"
    )
    return _table(title, header, rows)


def _table(title: str, header: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join([title, "", *lines])


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
    figure.savefig(path, dpi=150)
    plt.close(figure)


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
    """Draws collectives, and bytes on a device, into a PNG file."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    panels: tuple[tuple[str, Callable[[OnDevices], float]], ...] = (
        ("collectives in a step", lambda r: sum(r.collectives.values())),
        ("cached on a device (MiB)", lambda r: r.cached_bytes * 2**-20),
        ("temporaries on a device (MiB)", lambda r: r.temp_bytes * 2**-20),
    )
    for axis, (label, value) in zip(axes, panels, strict=True):
        for number, variant in enumerate(VARIANTS):
            own = [result for result in results if result.variant == variant]
            # Larger markers first, so that none is hidden where values are equal.
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
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _run_sweep(sweep: Sweep, rounds: int, output: Path | None, quiet: bool) -> Any:
    print(f"{sweep.name}: {sweep.title}, {rounds} rounds", file=sys.stderr)
    points = measure(sweep, rounds)
    lines = fits(sweep, points)
    if output is not None:
        draw(sweep, points, lines, output / f"scaling_{sweep.name}.png")
    if not quiet:
        print(markdown(sweep, points, lines), end="\n\n", flush=True)
    return [*points, *lines]


def _run_devices(output: Path | None, quiet: bool) -> Any:
    if len(jax.devices()) < max(DEVICES):
        results = _in_a_process_with_devices()
    else:
        print(f"devices: {', '.join(map(str, DEVICES))}", file=sys.stderr)
        results = measure_devices(workloads.resnet18(16))
    if output is not None:
        draw_devices(results, output / "scaling_devices.png")
    if not quiet:
        print(devices_markdown(results), end="\n\n", flush=True)
    return results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks.scaling",
        description=(__doc__ or "").split("\n", maxsplit=1)[0],
    )
    parser.add_argument(
        "--part",
        action="append",
        default=[],
        help=f"one of {', '.join(PARTS)}; may be repeated; default: all",
    )
    parser.add_argument(
        "--rounds", type=timing.rounds, default=7, help="(default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        default="docs/figures",
        help="directory of the plots (default: %(default)s); empty: none are drawn",
    )
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints and draws what was asked for."""
    parser = _parser()
    flags = parser.parse_args(arguments)
    try:
        parts = chosen("part", flags.part, PARTS)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    output = Path(flags.output) if flags.output else None
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    every: list[Finding] = []
    for part in parts:
        if part in SWEEPS:
            every += _run_sweep(SWEEPS[part], flags.rounds, output, flags.json)
        else:
            every += _run_devices(output, flags.json)
    if flags.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in every], indent=2))
    else:
        print(
            f"{timing.DEFINITION} What is added is the difference to {VARIANTS[0]} in "
            "the same round, likewise."
        )


if __name__ == "__main__":
    main()
