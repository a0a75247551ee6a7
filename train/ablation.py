"""Trains every variant of a grid with every seed, and writes what they reach.

`python -m train.ablation --config=configs/ablation_cifar10.py --workdir=DIR`

Every run has a workdir of its own, `DIR/VARIANT/seed_N`, and is a run of `train.main`:
one that was stopped goes on where it stopped, one that is finished is not run again.
One whose loss became infinite or NaN is left, and told of at the end.
`DIR/results.csv` has a row for each. The first seed of every variant comes first, so
that a grid that is stopped has something of each.
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
# What a row says of the last evaluation.
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
    """One variant, trained with one seed.

    Attributes:
      variant: its name.
      config: what is trained.
    """

    variant: str
    config: ConfigDict

    @property
    def path(self) -> Path:
        """Its workdir in that of the grid."""
        return Path(self.variant) / f"seed_{self.config.seed}"


def main(config: ConfigDict, workdir: Path) -> None:
    """Trains what is not trained yet; writes the table after every run."""
    terminal, grid = Terminal(), runs(config)
    chosen = _chosen(grid, _VARIANTS.value)
    for run in grid:  # before hours are spent on the others
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
    """Checks that a run can be trained, and that what is trained of it is still it."""
    try:
        job_lib.check(run.config)
    except ConfigError as error:
        raise ConfigError(
            f"Variant {run.variant!r} (its fields, and config.base): {error}"
        ) from error
    if _rows(run, workdir):
        workdir_lib.check_same(workdir / run.path, run.config)


def _rows(run: Run, workdir: Path) -> list[records.Row]:
    return records.read(workdir / run.path / "metrics.csv")


def runs(config: ConfigDict) -> list[Run]:
    """Every variant of a grid with each of its seeds: first the first seed of each.

    Args:
      config: `base`, the config that all runs share, and `variants`: for each its
        `memory`, `dropit` and `seeds`, and its `layers` if not those of `base`.

    Raises:
      ConfigError: a section or field is missing, unknown or of the wrong type.
    """
    _check_names("config", config, _SECTIONS)
    if not config.variants:
        raise ConfigError("config.variants is empty: there is nothing to train.")
    found: list[tuple[int, Run]] = []
    for name, variant in config.variants.items():
        _check_names(f"config.variants.{name}", variant, _FIELDS, _OPTIONAL)
        seeds = variant.seeds
        if not isinstance(seeds, tuple) or not seeds or len(set(seeds)) < len(seeds):
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
            except TypeError as error:
                raise ConfigError(f"config.variants.{name}: {error}") from error
            found.append((place, Run(name, one)))
    return [run for _, run in sorted(found, key=lambda each: each[0])]


def table(grid: list[Run], workdir: Path) -> str:
    """The last evaluation of every run that is finished, in CSV.

    A run whose loss became infinite or NaN has a row that says so.
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
