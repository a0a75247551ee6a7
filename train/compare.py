"""Trains DropIT and plain Flax from the same seed, and shows them side by side.

`python -m train.compare --config=configs/FILE.py --workdir=DIR [--target=h100]`
"""

import copy
import dataclasses
import json
import statistics
from pathlib import Path

import rich.console
import rich.table
from ml_collections import ConfigDict

from train import cli, loop, measurements, plots
from train import config as config_lib
from train import job as job_lib
from train.files import write_atomically
from train.target import TARGET
from train.terminal import Terminal

# The first is what the others are measured against.
_FLAX, _DROPIT = "flax", "dropit"


@dataclasses.dataclass(frozen=True)
class Measurements:
    """What one variant costs and reaches.

    Attributes:
      test_accuracy: after training, in [0, 1].
      cached_bytes: what the DropIT layers cache in a step; of plain Flax, the inputs
        of the same layers.
      temp_bytes: what a step allocates beside arguments and results on the target.
      step_seconds: median time of a step here.
    """

    test_accuracy: float
    cached_bytes: int
    temp_bytes: int
    step_seconds: float


def main(config: ConfigDict, workdir: Path) -> None:
    """Compiles, times and trains both variants, and writes the comparison."""
    target, terminal = TARGET.value, Terminal()
    variants = {_FLAX: config_lib.plain(config), _DROPIT: _compact(config)}
    job_lib.prepare(config)  # which may be told that it cannot be run
    terminal.say(f"Compiling a step for {target} ...")
    temp = {
        name: measurements.allocated(variant, target).temp_bytes
        for name, variant in variants.items()
    }
    rows = {
        name: loop.run(variant, workdir / name, terminal)
        for name, variant in variants.items()
    }
    terminal.say("Timing steps ...")
    seconds = measurements.step_seconds(variants)
    results = {
        name: Measurements(
            test_accuracy=rows[name][-1]["test_accuracy"],
            cached_bytes=measurements.cached_bytes(variant),
            temp_bytes=temp[name],
            step_seconds=statistics.median(seconds[name]),
        )
        for name, variant in variants.items()
    }
    plots.curves(rows, workdir / "curves.png")
    summary = {name: dataclasses.asdict(result) for name, result in results.items()}
    write_atomically(workdir / "comparison.json", json.dumps(summary, indent=2) + "\n")
    rich.console.Console().print(table(results, target))
    terminal.say(f"Curves: {workdir / 'curves.png'}")


def table(results: dict[str, Measurements], target: str) -> rich.table.Table:
    """The measurements of each variant, with their ratio to plain Flax."""
    flax, dropit = results[_FLAX], results[_DROPIT]
    shown = rich.table.Table("", "Flax", "DropIT", "DropIT / Flax")

    def add(label: str, field: str, scale: float, form: str) -> None:
        values = [getattr(result, field) for result in (flax, dropit)]
        texts = [format(value * scale, form) for value in values]
        shown.add_row(label, *texts, f"{values[1] / values[0]:.2f}")

    add("test accuracy", "test_accuracy", 1, ".3f")
    add("cached by Conv and Dense, MiB", "cached_bytes", 2**-20, ".1f")
    add(f"temp bytes of a step on {target}, MiB", "temp_bytes", 2**-20, ".1f")
    add("time of a step here, ms", "step_seconds", 1e3, ".0f")
    return shown


def _compact(config: ConfigDict) -> ConfigDict:
    """The config itself, or with DropIT if it has none."""
    variant = copy.deepcopy(config)
    if variant.memory == "baseline":
        variant.memory = "dropit"
    return variant


if __name__ == "__main__":
    cli.launch(main)
