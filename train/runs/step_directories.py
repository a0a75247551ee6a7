"""The directories of single steps in that of a run's checkpoints.

Of several processes, the first alone changes anything.
"""

import shutil
from pathlib import Path

from train.processes.collective import is_first
from train.system.disk import CheckpointError

# The end of a name that Orbax gives until all is written, and this program until all is
# removed.
_HALF_WRITTEN = ".orbax-checkpoint-tmp*"
_HALF_REMOVED = ".old"


def steps(directory: Path) -> set[int]:
    """The steps that something in a directory is named after."""
    return {int(path.name) for path in directory.glob("*") if is_step(path.name)}


def is_step(name: str) -> bool:
    """Whether a whole checkpoint can have this name."""
    return name.isdecimal() and name == str(int(name))


def half_written(directory: Path, step: int | str = "*") -> list[Path]:
    """The directories, of a step or of all, that Orbax has not written to their end."""
    return sorted(directory.glob(f"{step}{_HALF_WRITTEN}"))


def half_removed(directory: Path) -> list[Path]:
    """The directories that `remove` has not removed to their end."""
    return sorted(directory.glob(f".*{_HALF_REMOVED}"))


def remove(path: Path) -> None:
    """Removes a checkpoint so that none is ever seen of which a part is gone.

    Of a link to one, it is the link.

    Raises:
      OSError: it cannot be removed.
    """
    if not is_first():
        return
    if path.is_symlink():
        path.unlink()
        return
    shutil.rmtree(path.rename(path.with_name(f".{path.name}{_HALF_REMOVED}")))


def remove_rest(path: Path) -> None:
    """Removes what a process that was killed has left.

    Orbax would do so in the background, and may not be done when the run ends.

    Raises:
      CheckpointError: it cannot be removed.
    """
    if not is_first():
        return
    try:
        shutil.rmtree(path)
    except OSError as error:
        raise CheckpointError(f"Cannot remove {path}: {error}") from error


def move(source: Path, target: Path) -> None:
    """Moves a checkpoint out of the directory.

    Raises:
      CheckpointError: it cannot be moved.
    """
    if not is_first():
        return
    try:
        target.parent.mkdir(exist_ok=True)
        source.rename(target)
    except OSError as error:
        raise CheckpointError(f"Cannot move {source} to {target}: {error}") from error
