"""Trains every variant of a grid with every seed, and writes a table of the results.

`python -m train.ablation --config=configs/ablation_cifar10.py --workdir=DIR`

Every run has its own workdir, `DIR/VARIANT/seed_N`, and is a run of `train.main`. If
started again, the command resumes an interrupted run, and skips a finished one. A run
whose loss becomes infinite or NaN ends; the next one starts, and an error at the end
names the diverged ones. `DIR/results.csv` has a row for each run that is finished or
diverged. The first seed of every variant is trained first, so that an interrupted grid
has results of all variants.
"""

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from train import cli, loop
from train.config import config as config_lib
from train.config.config import ConfigError
from train.engine import job as job_lib
from train.engine.meter import NonFiniteLossError
from train.reports import summary
from train.runs import failure, records
from train.runs import workdir as workdir_lib
from train.runs.saved_runs import is_finished
from train.system import tables
from train.system.files import write_atomically
from train.system.terminal import Terminal

_VARIANTS = flags.DEFINE_list(
    "variants", None, "Names of the variants to train; all, if none is named."
)

_SECTIONS = ("base", "variants")
_FIELDS = ("memory", "dropit", "seeds")
_OPTIONAL = ("layers",)
# The columns of a row from the last evaluation.
_REACHED = (
    "step",
    "epoch",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A variant with one seed.

    Attributes:
      variant: the variant's name.
      config: the config, with the seed.
    """

    variant: str
    config: ConfigDict

    @property
    def path(self) -> Path:
        """The run's workdir, relative to the grid's: `VARIANT/seed_N`."""
        return Path(self.variant) / f"seed_{self.config.seed}"


def main(config: ConfigDict, workdir: Path) -> None:
    """Trains the unfinished runs of `--variants`; writes the table after every run.

    Raises:
      ConfigError: a config cannot be run, a variant is unknown, or, after all runs, the
        loss of a run became infinite or NaN.
    """
    terminal, grid = Terminal(), runs(config)
    chosen = _chosen(grid, _VARIANTS.value)
    for run in grid:  # all of them, before hours of training
        _check(run, workdir)
    job_lib.prepare(grid[0].config)
    diverged = []
    for number, run in enumerate(chosen, 1):
        terminal.say(f"Run {number} of {len(chosen)}: {run.path}")
        if not is_finished(run.config, _rows(run, workdir)):
            try:
                loop.run(run.config, workdir / run.path, terminal)
            except NonFiniteLossError as error:
                terminal.say(f"{run.path}: {error}")
                diverged.append(str(run.path))
        write_atomically(workdir / "results.csv", table(grid, workdir))
    terminal.say(f"Results: {workdir / 'results.csv'}")
    if diverged:
        raise ConfigError(
            f"The loss of {', '.join(diverged)} became infinite or NaN; the others are "
            "trained."
        )


def _chosen(grid: list[Run], names: list[str] | None) -> list[Run]:
    known = list(dict.fromkeys(run.variant for run in grid))
    for name in names or ():
        if name not in known:
            raise ConfigError(f"--variants={name}: the config has {', '.join(known)}.")
    return [run for run in grid if not names or run.variant in names]


def _check(run: Run, workdir: Path) -> None:
    """Checks a run's config.

    Raises:
      ConfigError: the config cannot be run, or is not that of the run in its workdir.
    """
    try:
        job_lib.check(run.config)
    except ConfigError as error:
        raise ConfigError(
            f"Variant {run.variant!r} (its fields, and config.base): {error}"
        ) from error
    is_done = is_finished(run.config, _rows(run, workdir))
    check = workdir_lib.check_same if is_done else workdir_lib.check_can_start
    check(workdir / run.path, run.config)


def _rows(run: Run, workdir: Path) -> list[records.Row]:
    return records.read(workdir / run.path / "metrics.csv")


def runs(config: ConfigDict) -> list[Run]:
    """Returns the runs of a grid, the first seeds of all variants first.

    With the seeds (42, 1) for "a" and (42,) for "b": a/seed_42, b/seed_42, a/seed_1.

    Args:
      config: the sections `base`, the config that all runs share, and `variants`: for
        each variant `memory`, `dropit` and `seeds`, and `layers` if it differs from
        `base`.

    Raises:
      ConfigError: a section, or a field of a variant, is missing, unknown or of the
        wrong type; there are no variants; or a variant has no seeds, or a seed twice.
    """
    _check_names("config", config, _SECTIONS)
    for section in _SECTIONS:
        if not isinstance(config[section], ConfigDict):
            raise ConfigError(
                f"config.{section} takes a ConfigDict, got {config[section]!r}."
            )
    if not config.variants:
        raise ConfigError("config.variants is empty: there is nothing to train.")
    found: list[tuple[int, Run]] = []
    for name, variant in config.variants.items():
        _check_names(f"config.variants.{name}", variant, _FIELDS, _OPTIONAL)
        seeds = variant.seeds
        if not isinstance(seeds, tuple) or not seeds or _has_repeats(seeds):
            raise ConfigError(
                f"config.variants.{name}.seeds takes different seeds, such as (42, 1), "
                f"got {seeds!r}."
            )
        for place, seed in enumerate(seeds):
            one = config_lib.without_unused_epochs(copy.deepcopy(config.base))
            try:
                one.memory, one.dropit = variant.memory, copy.deepcopy(variant.dropit)
                one.seed = seed
                one.layers = variant.get("layers", one.layers)
            except AttributeError as error:
                raise ConfigError(f"config.base: {error}") from error
            except TypeError as error:
                raise ConfigError(f"config.variants.{name}: {error}") from error
            found.append((place, Run(name, one)))
    return [run for _, run in sorted(found, key=lambda each: each[0])]


def _has_repeats(seeds: tuple[Any, ...]) -> bool:
    return len(set(map(repr, seeds))) < len(seeds)


def table(grid: list[Run], workdir: Path) -> str:
    """Returns the last evaluations of the finished runs in CSV.

    A run with an infinite or NaN loss has the status "diverged", and no evaluation.
    """
    columns = (
        *("variant", "seed", "memory", "layers", *summary.POLICY),
        *("status", *_REACHED),
    )
    rows = []
    for run in grid:
        own = _rows(run, workdir)
        if is_finished(run.config, own):
            last = {name: own[-1][name] for name in _REACHED}
            rows.append(_row(run) | {"status": "finished"} | last)
        elif failure.has_failed(workdir / run.path):
            rows.append(_row(run) | {"status": "diverged"})
    return tables.to_csv(columns, rows)


def _row(run: Run) -> dict[str, Any]:
    return {
        "variant": run.variant,
        "seed": run.config.seed,
        "memory": run.config.memory,
        "layers": run.config.layers,
        **summary.policy(run.config),
    }


def _check_names(
    where: str, section: Any, wanted: Sequence[str], optional: Sequence[str] = ()
) -> None:
    got = list(section) if isinstance(section, ConfigDict) else repr(section)
    if isinstance(section, ConfigDict) and set(section) - {*optional} == {*wanted}:
        return
    also = f", and may have {', '.join(optional)}" if optional else ""
    raise ConfigError(f"{where} has the fields {', '.join(wanted)}{also}; got {got}.")


if __name__ == "__main__":
    cli.launch(main)
