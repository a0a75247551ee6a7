"""Costs of a training step against batch, width, depth and number of devices.

`python -m benchmarks.scaling [--part=batch] [--output=docs/figures] [--json]`

Steps of plain Flax and of the presets are timed in turns, and lines are fitted to the
times: a cliff would be a point far from its line. The axis of each fit is a quantity to
which the work of plain Flax is proportional:

- batch and depth (hidden layers of an MLP) themselves;
- the square of the width: a convolution takes width² multiplications for each pixel,
  while the size of its residuals grows with the width alone.

The time that a preset adds to a step, over plain Flax in the same round, is fitted
against the number of elements that it compresses.

On 1, 2, 4 and 8 simulated devices with the same batch on each, steps are compiled and
not run: they would share the machine's cores. The results are a step's collectives, and
the stored and the temporary bytes on a device.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax

from benchmarks.printing import command, scaling_plots, timing
from benchmarks.workloads import image_models, sharded, sweeps
from benchmarks.workloads.sharded import DEVICES, OnDevices
from benchmarks.workloads.sweeps import SWEEPS, VARIANTS, Fit, Point, Sweep

PARTS = (*SWEEPS, "devices")
_DEVICES_FLAG = f"--xla_force_host_platform_device_count={max(DEVICES)}"

Finding: TypeAlias = Point | Fit | OnDevices


def markdown(sweep: Sweep, points: Sequence[Point], lines: Sequence[Fit]) -> str:
    """Returns a sweep's points and lines as two Markdown tables."""
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
    text = command.table(f"### {sweep.name}: {sweep.title}", header, rows)
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
    second = command.table("", [*header, "largest deviation"], rows)
    return f"{text}\n\n{second}"


def _scaled_slope(line: Fit) -> tuple[str, str]:
    if line.of == "added":
        return f"{1e9 * line.slope:,.2f}", "ns an element"
    return f"{1000 * line.slope:,.3f}", f"ms, by {line.against}"


def devices_markdown(results: Sequence[OnDevices]) -> str:
    """Returns the results for each number of devices as a Markdown table."""
    rows = [
        [
            str(result.devices),
            result.variant,
            ", ".join(f"{n} {kind}" for kind, n in result.collectives.items()) or "0",
            f"{result.residual_bytes * 2**-20:,.2f}",
            f"{result.temp_bytes * 2**-20:,.2f}",
        ]
        for result in results
    ]
    header = ["devices", "variant", "collectives", "residuals MiB", "temp MiB"]
    title = (
        f"### Devices: {SWEEPS['batch'].title}, batch {results[0].batch_per_device} on "
        "each, bytes on one of them"
    )
    return command.table(title, header, rows)


def _run_sweep(sweep: Sweep, rounds: int, output: Path | None, quiet: bool) -> Any:
    print(f"{sweep.name}: {sweep.title}, {rounds} rounds", file=sys.stderr)
    points = sweeps.measure(sweep, rounds)
    lines = sweeps.fits(sweep, points)
    if output is not None:
        scaling_plots.draw(sweep, points, lines, output / f"scaling_{sweep.name}.png")
    if not quiet:
        print(markdown(sweep, points, lines), end="\n\n", flush=True)
    return [*points, *lines]


def _in_a_process_with_devices() -> list[OnDevices]:
    """Runs `sharded.measure_devices` in a process with simulated devices.

    JAX reads their number once, at its start, and steps are timed without any.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES_FLAG}"
    itself = [sys.executable, "-m", "benchmarks.scaling", "--part=devices"]
    done = subprocess.run(
        [*itself, "--json", "--output="],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        check=True,
    )
    return [OnDevices(**each) for each in json.loads(done.stdout)]


def _run_devices(output: Path | None, quiet: bool) -> Any:
    if len(jax.devices()) < max(DEVICES):
        results = _in_a_process_with_devices()
    else:
        print(f"devices: {', '.join(map(str, DEVICES))}", file=sys.stderr)
        results = sharded.measure_devices(image_models.resnet18(16))
    if output is not None:
        scaling_plots.draw_devices(results, output / "scaling_devices.png")
    if not quiet:
        print(devices_markdown(results), end="\n\n", flush=True)
    return results


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("scaling", __doc__)
    parser.add_argument(
        "--part",
        action="append",
        default=[],
        help=f"one of {', '.join(PARTS)}; may be repeated; default: all",
    )
    parser.add_argument(
        "--rounds", type=timing.count, default=7, help="(default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        default="docs/figures",
        help="directory of the plots (default: %(default)s); empty: none are drawn",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command, and prints and draws its results."""
    parser = _parser()
    flags = parser.parse_args(arguments)
    try:
        parts = command.chosen("part", flags.part, PARTS)
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
        print(command.to_json(every))
    else:
        print(
            f"{timing.DEFINITION} What is added is the difference to {VARIANTS[0]} in "
            "the same round, likewise."
        )


if __name__ == "__main__":
    main()
