"""Finished runs on disk, and which of them differ by nothing but the seed."""

import copy
import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

from ml_collections import ConfigDict

from train.config import config as config_lib
from train.config.config import ConfigError
from train.runs import failure, records, workdir
from train.runs.records import Row

# What a variant may be; all else is alike in runs that are compared.
_VARIED = ("memory", "remat", "drop", "dropit", "seed")


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """A run as it lies on disk.

    Attributes:
      path: its workdir.
      config: what was trained.
      rows: of its `metrics.csv`.
    """

    path: Path
    config: ConfigDict
    rows: list[Row]

    @property
    def variant(self) -> str:
        """The name of its directory; of `VARIANT/seed_N`, that of the one above."""
        path = self.path.resolve()
        return (
            path.parent.name if path.name == f"seed_{self.config.seed}" else path.name
        )


def is_finished(config: ConfigDict, rows: list[Row]) -> bool:
    """Whether a run with these rows of `metrics.csv` is done."""
    return bool(rows) and rows[-1]["step"] == config_lib.steps(config)[1]


def find(
    directories: Iterable[Path], say: Callable[[str], None]
) -> dict[str, list[SavedRun]]:
    """The finished runs in directories and below them, by variant, by seed.

    Args:
      directories: where to look.
      say: is told of each run that is left out.

    Raises:
      ConfigError: there is none in one of them, or they cannot be compared.
      RecordsError: the metrics of one cannot be read.
    """
    found: dict[Path, SavedRun] = {}
    for directory in directories:
        below = [_read(path.parent) for path in sorted(directory.rglob("config.json"))]
        finished = [run for run in below if is_finished(run.config, run.rows)]
        for run in below:
            if run not in finished:
                say(f"Left out: {run.path}, which {_how_far(run)}.")
        if not finished:
            raise ConfigError(f"{directory} holds no finished run.")
        found |= {run.path.resolve(): run for run in finished}
    variants: dict[str, list[SavedRun]] = {}
    for run in found.values():
        variants.setdefault(run.variant, []).append(run)
    _check_comparable(variants)
    return {
        name: sorted(each, key=lambda run: run.config.seed)
        for name, each in variants.items()
    }


def _how_far(run: SavedRun) -> str:
    if failure.is_in(run.path):
        return "ended with a loss that is not finite"
    done = run.rows[-1]["step"] if run.rows else 0
    return f"has {done} of its {config_lib.steps(run.config)[1]} steps"


def _read(path: Path) -> SavedRun:
    return SavedRun(path, workdir.read_config(path), records.read(path / "metrics.csv"))


def _check_comparable(variants: dict[str, list[SavedRun]]) -> None:
    first = next(iter(variants.values()))[0]
    for name, runs in variants.items():
        for run in runs:
            _check_alike(first, run, _VARIED, "cannot be compared")
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
    alike = copy.deepcopy(b.config)
    for name in varied:
        alike[name] = copy.deepcopy(a.config[name])
    before, after = config_lib.to_json(a.config), config_lib.to_json(alike)
    if changed := config_lib.differences(before, after):
        raise ConfigError(
            f"{a.path} and {b.path} {problem}:\n  " + "\n  ".join(changed)
        )
