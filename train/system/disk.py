"""Room for what a run writes."""

import shutil
import tempfile
from pathlib import Path

# Two latest checkpoints, the best, and the one being written.
_COPIES = 4


class CheckpointError(Exception):
    """A checkpoint that cannot be written or read, and what to do."""


def check_writable(directory: Path, state_bytes: int) -> None:
    """Checks that the checkpoints of a run can be written into a directory.

    Args:
      directory: of the checkpoints, which may be there already; it is made if need be.
      state_bytes: size of what one of them holds.

    Raises:
      CheckpointError: nothing can be written there, or there is too little room.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(4096))
            file.flush()
        there = _bytes_in(directory)
    except OSError as error:
        raise CheckpointError(f"Cannot write to {directory}: {error}") from error
    check_room(directory, _COPIES * state_bytes - there)


def check_room(directory: Path, needed: int) -> None:
    """Checks that so many bytes can be written into a directory.

    Raises:
      CheckpointError: nothing can be written there, or there is too little room.
    """
    try:
        with tempfile.TemporaryFile(dir=directory):
            free = shutil.disk_usage(directory).free
    except OSError as error:
        raise CheckpointError(f"Cannot write to {directory}: {error}") from error
    if free < needed:
        raise CheckpointError(
            f"{directory} has room for {_size(free)}, and checkpoints will take "
            f"{_size(needed)}. Make room, or take a --workdir on "
            "another disk. What is there stays, and the same command goes on from it."
        )


def _size(count: int) -> str:
    """Returns a number of bytes in the largest unit of which there is one."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:,.1f}".removesuffix(".0") + f" {unit}"
    return f"{count:,} bytes"


def _bytes_in(directory: Path) -> int:
    try:
        return sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())
    except FileNotFoundError:  # another process removes what is half-written
        return 0
