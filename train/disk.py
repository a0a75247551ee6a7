"""Room for what a run will write."""

import shutil
import tempfile
from pathlib import Path

from train.checkpoint import CheckpointError

# Two latest checkpoints, the best, and the one being written.
_COPIES = 4


def check_writable(directory: Path, state_bytes: int) -> None:
    """Checks that checkpoints of a run can be written into a directory.

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
        there = sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())
        free = shutil.disk_usage(directory).free
    except OSError as error:
        raise CheckpointError(f"Cannot write to {directory}: {error}") from error
    needed = _COPIES * state_bytes - there
    if free < needed:
        raise CheckpointError(
            f"{directory} has {free * 2**-20:,.0f} MiB free, and checkpoints will take "
            f"{needed * 2**-20:,.0f} MiB ({_COPIES} of {state_bytes * 2**-20:,.1f} MiB "
            "each). Make room, or take a --workdir on another disk."
        )
