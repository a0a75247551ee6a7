"""Finished runs on disk, grouped by variant: runs that differ only in the seed."""

import copy
import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

from ml_collections import ConfigDict

from train.config import config as config_lib
from train.config.config import ConfigError
from train.runs import failure, records, workdir
from train.runs.records import Row

# Fields of the config that may differ between compared runs.
_VARIANT_FIELDS = ("memory", "layers", "remat", "dropit", "seed")


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """A run that was read from disk.

    Attributes:
      path: its workdir.
      config: its config.
      rows: the rows of its `metrics.csv`.
    """

    path: Path
    config: ConfigDict
    rows: list[Row]

    @property
    def variant(self) -> str:
        """The name of the workdir, or `VARIANT` of `VARIANT/seed_N` for the seed N."""
        path = self.path.resolve()
        return (
            path.parent.name if path.name == f"seed_{self.config.seed}" else path.name
        )


def is_finished(config: ConfigDict, rows: list[Row]) -> bool:
    """Returns whether the last row of a run's `metrics.csv` is of its last step."""
    return bool(rows) and rows[-1]["step"] == config_lib.steps(config)[1]


def find(
    directories: Iterable[Path], say: Callable[[str], None]
) -> dict[str, list[SavedRun]]:
    """Returns the finished runs in and below some directories.

    Args:
      directories: directories to search.
      say: called with a message for each unfinished run, which is left out.

    Returns:
      For each variant, its runs in the order of their seeds.

    Raises:
      ConfigError: a directory has no finished run, a `config.json` in or below it
        cannot be read, or the runs cannot be compared.
      RecordsError: the metrics of a run cannot be read.
    """
    found: dict[Path, SavedRun] = {}
    for directory in directories:
        below = [_read(path.parent) for path in sorted(directory.rglob("config.json"))]
        finished = [run for run in below if is_finished(run.config, run.rows)]
        for run in below:
            if run not in finished:
                say(f"Left out: {run.path}, which {_why_left_out(run)}.")
        if not finished:
            raise ConfigError(f"{directory} holds no finished run.")
        found |= {run.path.resolve(): run for run in finished}
    variants: dict[str, list[SavedRun]] = {}
    for run in found.values():
        variants.setdefault(run.variant, []).append(run)
    _check_comparable(variants)
    return {
        name: sorted(runs, key=lambda run: run.config.seed)
        for name, runs in variants.items()
    }


def _why_left_out(run: SavedRun) -> str:
    if failure.has_failed(run.path):
        return "ended with a loss that is not finite"
    done = run.rows[-1]["step"] if run.rows else 0
    return f"has {done} of its {config_lib.steps(run.config)[1]} steps"


def _read(path: Path) -> SavedRun:
    return SavedRun(path, workdir.read_config(path), records.read(path / "metrics.csv"))


def _check_comparable(variants: dict[str, list[SavedRun]]) -> None:
    """Checks that runs can be compared.

    Runs of different variants may differ in `_VARIANT_FIELDS`; runs of one variant
    must differ in the seed alone. Fields that `config.differences` leaves out are free.

    Raises:
      ConfigError: the runs cannot be compared; the message lists the differences.
    """
    first = next(iter(variants.values()))[0]
    for name, runs in variants.items():
        for run in runs:
            _check_alike(first, run, _VARIANT_FIELDS, "cannot be compared")
            _check_alike(
                runs[0], run, ("seed",), f"are both called {name!r}, and are not alike"
            )
        seeds = [run.config.seed for run in runs]
        if len(set(seeds)) < len(seeds):
            raise ConfigError(
                f"Of the runs of {name!r}, two have the same seed: "
                + ", ".join(str(run.path) for run in runs)
            )


def _check_alike(
    a: SavedRun, b: SavedRun, varied: tuple[str, ...], problem: str
) -> None:
    """Checks that two configs are equal in all fields that are not in `varied`.

    Fields that `config.differences` leaves out, such as `workers`, may differ.

    Raises:
      ConfigError: they differ; the message holds `problem` and the differences.
    """
    masked = copy.deepcopy(b.config)
    for name in varied:
        masked[name] = copy.deepcopy(a.config[name])
    before, after = config_lib.to_json(a.config), config_lib.to_json(masked)
    if changed := config_lib.differences(before, after):
        raise ConfigError(
            f"{a.path} and {b.path} {problem}:\n  " + "\n  ".join(changed)
        )
