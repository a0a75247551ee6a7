"""Checks of free disk space before checkpoints are written."""

import shutil
import tempfile
from pathlib import Path

# The two latest checkpoints, the best one, and the one being written.
_MAX_CHECKPOINTS = 4


class CheckpointError(Exception):
    """Raised when a checkpoint cannot be written or read, with advice to the user."""


def check_writable(directory: Path, state_bytes: int) -> None:
    """Checks that a directory is writable and has room for all checkpoints of a run.

    Files that the directory already holds count towards the space of four checkpoints.

    Args:
      directory: directory of the checkpoints; created if it does not exist.
      state_bytes: size of the state in one checkpoint, in bytes.

    Raises:
      CheckpointError: the directory cannot be written, or the disk has too little room.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(4096))
            file.flush()
        existing_bytes = _bytes_in(directory)
    except OSError as error:
        raise CheckpointError(f"Cannot write to {directory}: {error}") from error
    check_room(directory, _MAX_CHECKPOINTS * state_bytes - existing_bytes)


def check_room(directory: Path, needed: int) -> None:
    """Checks that a directory is writable and its disk has `needed` bytes free.

    Raises:
      CheckpointError: the directory cannot be written, or the disk has too little room.
    """
    try:
        with tempfile.TemporaryFile(dir=directory):
            free = shutil.disk_usage(directory).free
    except OSError as error:
        raise CheckpointError(f"Cannot write to {directory}: {error}") from error
    if free < needed:
        raise CheckpointError(
            f"{directory} has room for {_with_unit(free)}, and checkpoints will take "
            f"{_with_unit(needed)}. Make room, or take a --workdir on "
            "another disk. What is there stays, and the same command goes on from it."
        )


def _with_unit(count: int) -> str:
    """Returns a number of bytes as text: 1023 -> "1,023 bytes", 1536 -> "1.5 KiB"."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:,.1f}".removesuffix(".0") + f" {unit}"
    return f"{count:,} bytes"


def _bytes_in(directory: Path) -> int:
    try:
        return sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())
    except FileNotFoundError:  # another process is removing half-written files
        return 0
