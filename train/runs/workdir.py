"""The working directory of a run: its lock, its config and its checkpoints."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from ml_collections import ConfigDict

from train.config import config as config_lib
from train.config.config import ConfigError
from train.engine import step as step_lib
from train.processes import collective
from train.runs import lock, records
from train.runs.checkpoints import Checkpoints
from train.runs.checkpoints.step_directories import is_step
from train.runs.lock import LockedError
from train.system.files import write_atomically
from train.system.text import join_lines

_CONFIG_FILE = "config.json"


def read_config(workdir: Path) -> ConfigDict:
    """Returns the config of the run in a workdir.

    Raises:
      ConfigError: the workdir has no config, or the config cannot be read.
    """
    try:
        return config_lib.from_json((workdir / _CONFIG_FILE).read_text())
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise ConfigError(
            f"{workdir} holds no run that can be read: {error}"
        ) from error


@contextlib.contextmanager
def created_and_locked(workdir: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Creates a workdir and locks it against other runs while the context lasts.

    Removes the created directories that are still empty at the end. Only the first of
    several processes does all this. If it fails, the others raise a `ConfigError`.

    Args:
      workdir: the working directory.
      say: called with a warning if the disk has no locks.

    Raises:
      ConfigError: the workdir cannot be created or written.
      LockedError: another run is writing to the workdir.
    """
    problem: Exception | None = None
    with contextlib.ExitStack() as stack:
        if collective.is_first():
            try:
                stack.enter_context(_created(workdir))
                stack.enter_context(lock.locked(workdir, say))
            except OSError as error:
                problem = ConfigError(f"Cannot write to {workdir}: {error}")
            except LockedError as error:
                problem = error
        if collective.any_process(problem is not None):
            raise problem or ConfigError(f"Process 0 cannot write to {workdir}.")
        yield


@contextlib.contextmanager
def _created(workdir: Path) -> Iterator[None]:
    missing = [path for path in (workdir, *workdir.parents) if not path.exists()]
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if missing:
            missing.insert(0, workdir / "checkpoints")
        for path in missing:
            with contextlib.suppress(OSError):  # the directory is not empty
                path.rmdir()


def check_can_start(workdir: Path, config: ConfigDict) -> None:
    """Checks that a run of this config can start or go on in the workdir.

    Raises:
      ConfigError: the workdir holds a run of another config, or the metrics of a run
        without its checkpoints.
      RecordsError: `metrics.csv` cannot be read, and there is no checkpoint.
    """
    if any(is_step(path.name) for path in (workdir / "checkpoints").glob("*/")):
        check_same(workdir, config)
        return
    # A run writes its first row after its first checkpoint: they have been removed.
    if records.read(workdir / records.NAME):
        raise ConfigError(
            f"{workdir} holds the metrics of a run, and no checkpoint to go on from: "
            "put checkpoints/ back, take another --workdir, or delete it to start over."
        )


def check_same(workdir: Path, config: ConfigDict) -> None:
    """Checks that the run in a workdir has this config.

    Fields that `config.differences` leaves out, such as `workers`, may differ.

    Raises:
      ConfigError: the run has another config or the layers "lean", which are gone; or
        its config is missing or cannot be read.
    """
    before = config_lib.to_json(read_config(workdir))
    config_lib.check_can_go_on((workdir / _CONFIG_FILE).read_text())
    if changed := config_lib.differences(before, config_lib.to_json(config)):
        raise ConfigError(
            f"{workdir} holds a run of another config. Take another --workdir, or "
            f"delete it to start over. Changed:{join_lines(changed)}"
        )


def read_checkpoints(workdir: Path) -> Checkpoints:
    """Returns the checkpoints of a run, opened without changing anything on disk."""
    return Checkpoints(
        workdir / "checkpoints",
        read_only=True,
        problem=lambda step, state, _: step_lib.problem(step, state),
    )


def write_config(workdir: Path, config: ConfigDict) -> None:
    """Writes the config into the workdir; returns once all processes have called it.

    Raises:
      ConfigError: the config cannot be written.
    """
    if collective.is_first():
        try:
            write_atomically(workdir / _CONFIG_FILE, config_lib.to_json(config))
        except OSError as error:
            raise ConfigError(f"Cannot write to {workdir}: {error}") from error
    collective.synchronise("claim")
