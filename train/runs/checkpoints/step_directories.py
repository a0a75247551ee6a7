"""The directories of single steps, such as `checkpoints/400`.

Only the first of several processes changes anything on disk.
"""

import shutil
from pathlib import Path

from train.processes.collective import is_first
from train.system.disk import CheckpointError

# Ends of the names that Orbax gives a directory until it is completely written, and
# that this program gives it until it is completely removed.
_HALF_WRITTEN = ".orbax-checkpoint-tmp*"
_HALF_REMOVED = ".old"


def steps(directory: Path) -> set[int]:
    """Returns the steps of the whole checkpoints in a directory; reads names alone."""
    return {int(path.name) for path in directory.glob("*") if is_step(path.name)}


def is_step(name: str) -> bool:
    """Returns whether a name is that of a whole checkpoint: "40", but not "040"."""
    return name.isdecimal() and name == str(int(name))


def half_written(directory: Path, step: int | str = "*") -> list[Path]:
    """Returns the directories, of one step or all, that Orbax left half-written."""
    return sorted(directory.glob(f"{step}{_HALF_WRITTEN}"))


def half_removed(directory: Path) -> list[Path]:
    """Returns the directories that an interrupted `remove` has left."""
    return sorted(directory.glob(f".*{_HALF_REMOVED}"))


def remove(path: Path) -> None:
    """Removes a checkpoint, or a symbolic link to one, in the first process alone.

    Renames the checkpoint first: no reader ever finds a partly removed one.

    Raises:
      OSError: the checkpoint cannot be removed.
    """
    if not is_first():
        return
    if path.is_symlink():
        path.unlink()
        return
    shutil.rmtree(path.rename(path.with_name(f".{path.name}{_HALF_REMOVED}")))


def remove_rest(path: Path) -> None:
    """Removes a half-written or half-removed directory that a killed process left.

    Only the first process removes it. Orbax would remove it in the background, and may
    not finish before the run ends.

    Raises:
      CheckpointError: the directory cannot be removed.
    """
    if not is_first():
        return
    try:
        shutil.rmtree(path)
    except OSError as error:
        raise CheckpointError(f"Cannot remove {path}: {error}") from error


def move(source: Path, target: Path) -> None:
    """Moves a checkpoint, in the first process alone; creates the target's parent.

    Raises:
      CheckpointError: the checkpoint cannot be moved.
    """
    if not is_first():
        return
    try:
        target.parent.mkdir(exist_ok=True)
        source.rename(target)
    except OSError as error:
        raise CheckpointError(f"Cannot move {source} to {target}: {error}") from error
