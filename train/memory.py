"""Prints the memory of a config's training step on a GPU, which need not be there.

`python -m train.memory --config=configs/FILE.py --target=a5000 [--max_batch] [--json]`
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import rich.console
import rich.table
from absl import flags
from ml_collections import ConfigDict

from dropit_jax import memory
from train import cli
from train.config import config as config_lib
from train.config import flags as config_flags
from train.engine import step as step_lib
from train.reports import measurements

_TARGET = config_flags.target()

_MAX_BATCH = flags.DEFINE_bool("max_batch", False, "Also find the largest batch.")
_JSON = flags.DEFINE_bool("json", False, "Print an object, not tables.")


def main(config: ConfigDict, _: Path) -> None:
    """Compiles the step, and the step with plain Flax, and prints their memory."""
    variants = {name_of(config): config}
    if name_of(config) != config_lib.BASELINE:
        variants = {config_lib.BASELINE: config_lib.plain(config)} | variants
    reports = {
        name: measurements.allocated(each, _TARGET.value)
        for name, each in variants.items()
    }
    plans: dict[str, memory.BatchPlan | None] = {}
    if _MAX_BATCH.value:
        plans = {name: plan(each, _TARGET.value) for name, each in variants.items()}
    if _JSON.value:
        print(json.dumps(as_dict(reports, plans), indent=2))
        return
    console = rich.console.Console(highlight=False)
    console.print(table(config.batch_size, reports, plans))
    console.print(buffers(name_of(config), reports[name_of(config)]))


def name_of(config: ConfigDict) -> str:
    """Returns the name of a config's variant, such as "lean+remat_blocks"."""
    remat = "" if config.remat == "none" else f"+remat_{config.remat}"
    layers = "" if config.layers == "flax" else f"+{config.layers}_layers"
    return f"{config.memory}{layers}{remat}"


def plan(config: ConfigDict, target: str) -> memory.BatchPlan | None:
    """Returns the largest batch of a config that fits; `None` if the smallest does not.

    A batch is a multiple of `config.accumulate_steps`.
    """
    parts = config.accumulate_steps
    abstract = functools.partial(step_lib.abstract, config)
    try:
        found = memory.max_batch(lambda size: (*abstract(size * parts), 0), target)
    except memory.NoBatchFitsError:
        return None
    return dataclasses.replace(found, batch=found.batch * parts)


def table(
    batch: int,
    reports: dict[str, memory.CompileReport],
    plans: dict[str, memory.BatchPlan | None],
) -> rich.table.Table:
    """Returns a table of the reports, with a column for each variant."""
    target = next(iter(reports.values())).target
    title = f"A training step of {batch} images on {target}"
    shown = rich.table.Table("", *reports, title=title)
    for label, size in (
        ("arguments, MiB", lambda each: each.argument_bytes),
        (
            "results beside them, MiB",
            lambda each: each.output_bytes - each.aliased_bytes,
        ),
        ("temporaries, MiB", lambda each: each.temp_bytes),
        ("all, MiB", lambda each: each.peak_bytes),
    ):
        sizes = (f"{size(each) * 2**-20:,.1f}" for each in reports.values())
        shown.add_row(label, *sizes)
    flops = (f"{each.flops * 1e-9:,.1f}" for each in reports.values())
    shown.add_row("GFLOPs of products", *flops)
    if plans:
        found = [plans[name] for name in reports]
        batches = ("none" if each is None else f"{each.batch:,}" for each in found)
        shown.add_row("largest batch", *batches)
    return shown


def buffers(name: str, each: memory.CompileReport) -> rich.table.Table:
    """Returns a table of a variant's largest buffers at the peak of memory."""
    shown = rich.table.Table("MiB", "array", title=f"At the peak of {name}")
    for column in ("layer", "operation", "pass"):
        shown.add_column(column, overflow="fold")
    for buffer in each.buffers:
        shown.add_row(
            f"{buffer.nbytes * 2**-20:,.2f}",
            f"{buffer.dtype}{list(buffer.shape)}",
            buffer.layer,
            buffer.operation,
            "backward" if buffer.backward else "forward",
        )
    return shown


def as_dict(
    reports: dict[str, memory.CompileReport], plans: dict[str, memory.BatchPlan | None]
) -> dict[str, Any]:
    """Returns the reports and largest batches of all variants, for JSON.

    For instance `{"lean": {"temp_bytes": 1024, ..., "max_batch": 256}}`.
    """
    every: dict[str, Any] = {
        name: dataclasses.asdict(each) | {"peak_bytes": each.peak_bytes}
        for name, each in reports.items()
    }
    for name, found in plans.items():
        every[name]["max_batch"] = None if found is None else found.batch
    return every


if __name__ == "__main__":
    cli.launch(main, needs_workdir=False)
