"""Trains every variant of a grid with every seed, and writes what they reach.

`python -m train.ablation --config=configs/ablation_cifar10.py --workdir=DIR`

Every run has a workdir of its own, `DIR/VARIANT/seed_N`, and is a run of `train.main`:
one that was stopped goes on where it stopped, one that is finished is not run again.
`DIR/results.csv` has a row for each that is finished. The first seed of every variant
comes first, so that a grid that is stopped has something of each.
"""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from train import cli, loop, records, summary, tables, validation
from train import job as job_lib
from train import workdir as workdir_lib
from train.config import ConfigError
from train.files import write_atomically
from train.runs import is_finished
from train.terminal import Terminal

_VARIANTS = flags.DEFINE_list(
    "variants", None, "Names of the variants to train; all, if none is named."
)

_SECTIONS = ("base", "variants")
_FIELDS = ("memory", "dropit", "seeds")
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
    for run in grid:  # before hours are spent on the others
        validation.validate(run.config, jax.device_count())
    job_lib.prepare(grid[0].config)
    chosen = _chosen(grid, _VARIANTS.value)
    for number, run in enumerate(chosen, 1):
        terminal.say(f"Run {number} of {len(chosen)}: {run.path}")
        if is_finished(run.config, _rows(run, workdir)):
            workdir_lib.check(workdir / run.path, run.config)
        else:
            loop.run(run.config, workdir / run.path, terminal)
        write_atomically(workdir / "results.csv", table(grid, workdir))
    terminal.say(f"Results: {workdir / 'results.csv'}")


def _chosen(grid: list[Run], names: list[str] | None) -> list[Run]:
    known = list(dict.fromkeys(run.variant for run in grid))
    for name in names or ():
        if name not in known:
            raise ConfigError(f"--variants={name}: the config has {', '.join(known)}.")
    return [run for run in grid if names is None or run.variant in names]


def _rows(run: Run, workdir: Path) -> list[records.Row]:
    return records.read(workdir / run.path / "metrics.csv")


def runs(config: ConfigDict) -> list[Run]:
    """Every variant of a grid with each of its seeds: first the first seed of each.

    Args:
      config: `base`, the config that all have in common, and `variants`: for each, its
        `memory`, its `dropit` and its `seeds`.

    Raises:
      ConfigError: a section or field is missing, unknown or of the wrong type.
    """
    _check_names("config", config, _SECTIONS)
    if not config.variants:
        raise ConfigError("config.variants is empty: there is nothing to train.")
    found: list[tuple[int, Run]] = []
    for name, variant in config.variants.items():
        _check_names(f"config.variants.{name}", variant, _FIELDS)
        seeds = variant.seeds
        if not isinstance(seeds, tuple) or not seeds or len(set(seeds)) < len(seeds):
            raise ConfigError(
                f"config.variants.{name}.seeds takes different seeds, such as (42, 1), "
                f"got {seeds!r}."
            )
        for place, seed in enumerate(seeds):
            one = copy.deepcopy(config.base)
            one.memory, one.dropit = variant.memory, copy.deepcopy(variant.dropit)
            one.seed = seed
            found.append((place, Run(name, one)))
    return [run for _, run in sorted(found, key=lambda each: each[0])]


def table(grid: list[Run], workdir: Path) -> str:
    """The last evaluation of every run that is finished, in CSV."""
    columns = ("variant", "seed", "memory", *summary.POLICY, "dropped", *_REACHED)
    rows = [(run, _rows(run, workdir)) for run in grid]
    finished = (_row(run, own[-1]) for run, own in rows if is_finished(run.config, own))
    return tables.to_csv(columns, finished)


def _row(run: Run, last: records.Row) -> dict[str, Any]:
    return {
        "variant": run.variant,
        "seed": run.config.seed,
        "memory": run.config.memory,
        **summary.policy(run.config),
        **{name: last[name] for name in _REACHED},
    }


def _check_names(where: str, section: Any, wanted: tuple[str, ...]) -> None:
    if not isinstance(section, ConfigDict) or set(section) != set(wanted):
        got = list(section) if isinstance(section, ConfigDict) else repr(section)
        raise ConfigError(f"{where} has the fields {', '.join(wanted)}; got {got}.")


if __name__ == "__main__":
    cli.launch(main)
