"""Trains DropIT and plain Flax from the same seed, and shows them side by side.

`python -m train.compare --config=configs/FILE.py --workdir=DIR [--target=h100]`
"""

import copy
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import rich.console
import rich.table
from ml_collections import ConfigDict

from dropit_jax import memory
from train import cli, loop
from train.config import config as config_lib
from train.config import flags as config_flags
from train.engine import job as job_lib
from train.reports import measurements, plots
from train.runs import workdir as workdir_lib
from train.system.files import write_atomically
from train.system.terminal import Terminal

_TARGET = config_flags.target()

# The names of the variants; the first is the baseline.
_FLAX, _DROPIT = "flax", "dropit"


@dataclasses.dataclass(frozen=True)
class Measurements:
    """The cost and the accuracy of a variant.

    Attributes:
      test_accuracy: the test accuracy after training, in [0, 1].
      stored_bytes: the bytes that a step stores between forward and backward pass.
        This and the next fields are `None` if the measurement failed.
      temp_bytes: the temporary bytes of a step on the target.
      step_seconds: the median time of a step here.
    """

    test_accuracy: float
    stored_bytes: int | None
    temp_bytes: int | None
    step_seconds: float | None


def main(config: ConfigDict, workdir: Path) -> None:
    """Trains both variants, measures them, and writes the comparison."""
    target, terminal = _TARGET.value, Terminal()
    memory.target_path(target)  # an unknown target is an error before the training
    variants = {_FLAX: config_lib.plain(config), _DROPIT: _dropping(config)}
    job_lib.prepare(config)  # an invalid config is an error before the training
    for name, variant in variants.items():
        trained = config_lib.without_unused_epochs(variant)  # as `loop.run` trains it
        workdir_lib.check_can_start(workdir / name, trained)
    rows = {
        name: loop.run(variant, workdir / name, terminal)
        for name, variant in variants.items()
    }
    terminal.say(f"Timing steps, and compiling one for {target} ...")
    measured = _measured(variants, target, terminal)
    results = {
        name: Measurements(
            test_accuracy=rows[name][-1]["test_accuracy"],
            **{what: each[name] for what, each in measured.items()},
        )
        for name in variants
    }
    plots.curves(rows, workdir / "curves.png")
    summary = {name: dataclasses.asdict(result) for name, result in results.items()}
    write_atomically(workdir / "comparison.json", json.dumps(summary, indent=2) + "\n")
    rich.console.Console().print(table(results, target))
    terminal.say(f"Curves: {workdir / 'curves.png'}")


def _measured(
    variants: dict[str, ConfigDict], target: str, terminal: Terminal
) -> dict[str, dict[str, Any]]:
    """Returns the measurements by field and variant.

    For instance `{"stored_bytes": {"flax": 4096, "dropit": 1024}, ...}`. A measurement
    that fails is `None` for both variants, and the reason is printed.
    """

    def stored() -> dict[str, int | None]:
        return {n: measurements.stored_bytes(each) for n, each in variants.items()}

    def temporary() -> dict[str, int]:
        return {
            name: measurements.allocated(each, target).temp_bytes
            for name, each in variants.items()
        }

    def seconds() -> dict[str, float]:
        times = measurements.step_seconds(variants)
        return {name: statistics.median(each) for name, each in times.items()}

    found: dict[str, dict[str, Any]] = {}
    for measure, field, label in (
        (stored, "stored_bytes", "What a step stores"),
        (temporary, "temp_bytes", f"The memory of a step on {target}"),
        (seconds, "step_seconds", "The time of a step"),
    ):
        try:
            found[field] = measure()
        except Exception as error:  # of any type: the training is still reported
            found[field] = dict.fromkeys(variants)
            terminal.say(f"{label} could not be measured: {_reason(error)}")
    return found


def _reason(error: Exception) -> str:
    """Returns the last line of an error's message; without one, the error's type."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def table(results: dict[str, Measurements], target: str) -> rich.table.Table:
    """Returns a table of the measurements of each variant and their ratios.

    A measurement that failed has no row.
    """
    flax, dropit = results[_FLAX], results[_DROPIT]
    shown = rich.table.Table("", "Flax", "DropIT", "DropIT / Flax")

    def add(label: str, field: str, scale: float, form: str) -> None:
        values = [getattr(result, field) for result in (flax, dropit)]
        if None in values:
            return
        texts = [format(value * scale, form) for value in values]
        ratio = f"{values[1] / values[0]:.2f}" if values[0] else "-"
        shown.add_row(label, *texts, ratio)

    add("test accuracy", "test_accuracy", 1, ".3f")
    add("stored for the backward pass, MiB", "stored_bytes", 2**-20, ".1f")
    add(f"temp bytes of a step on {target}, MiB", "temp_bytes", 2**-20, ".1f")
    add("time of a step here, ms", "step_seconds", 1e3, ".0f")
    return shown


def _dropping(config: ConfigDict) -> ConfigDict:
    """Returns a copy of the config; a plain Flax config gets the preset "dropit"."""
    variant = copy.deepcopy(config)
    if variant.memory == config_lib.BASELINE and variant.layers == "flax":
        variant.memory = "dropit"
    return variant


if __name__ == "__main__":
    cli.launch(main)
