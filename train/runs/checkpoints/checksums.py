"""Detection of damaged checkpoints, by the CRC-32 of each file and the step.

Each checkpoint stores both in `checksums.json`. Orbax and TensorStore notice files that
they cannot parse, but neither a changed array value nor a directory that was renamed to
another step.
"""

import json
import time
import zlib
from pathlib import Path
from typing import Any

from train.system.files import write_atomically
from train.system.text import shorten

_NAME = "checksums.json"
_VERSION = 1
# The step of a checkpoint from before `checksums.json` had a version.
_UNKNOWN_STEP = object()
# Bytes that are read at once.
_BLOCK_BYTES = 2**20

# Orbax writes to these two files after the checksums are written. It adds the commit
# time to the first, which is therefore left out of its checksum; the second is empty.
_ORBAX_METADATA, _ORBAX_TIME = "_CHECKPOINT_METADATA", "commit_timestamp_nsecs"
_ORBAX_SUCCESS_FILE = "commit_success.txt"
# The field that Orbax adds before, from a thread that it does not wait for.
_ORBAX_LAST_FIELD = "item_handlers"
_MOST_SECONDS = 10.0


def write(directory: Path, step: int) -> None:
    """Writes `checksums.json` with the step and the checksums of a checkpoint's files.

    Args:
      directory: directory of the checkpoint.
      step: number of steps done.
    """
    files = {name: _crc32(path) for name, path in sorted(_files(directory).items())}
    content = {"version": _VERSION, "step": step, "files": files}
    write_atomically(directory / _NAME, json.dumps(content, indent=1))


def wait_for_orbax(directory: Path) -> None:
    """Waits until Orbax has written all of its metadata but the commit time.

    Orbax writes them from a thread, and a checksum of half of them would be wrong.
    Gives up after ten seconds.

    Args:
      directory: directory of the checkpoint, which Orbax is about to rename.
    """
    path, end = directory / _ORBAX_METADATA, time.monotonic() + _MOST_SECONDS
    while time.monotonic() < end:
        try:
            if _table(path.read_bytes()).get(_ORBAX_LAST_FIELD) is not None:
                return
        except FileNotFoundError:
            pass
        time.sleep(0.01)


def problem(directory: Path, step: int) -> str:
    """Returns a description of the damage to a checkpoint, or "" if it is intact.

    A checkpoint is damaged if a file is missing or has changed, or if it was written as
    that of another step.

    Args:
      directory: directory of the checkpoint.
      step: the step that the checkpoint should have.
    """
    try:
        written, checksums = _parse((directory / _NAME).read_bytes())
    except FileNotFoundError:
        if not directory.exists():
            return "it is gone: a run that goes on removes older ones"
        return f"{_NAME} is missing"
    except (OSError, ValueError, RecursionError) as error:
        return f"{_NAME}: {type(error).__name__}: {shorten(error)}"
    if written not in (step, _UNKNOWN_STEP):
        return f"it was written as that of step {shorten(written)}"
    try:
        return _first_change(_files(directory), checksums)
    except OSError as error:
        return f"{type(error).__name__}: {shorten(error)}"


def _first_change(found: dict[str, Path], checksums: dict[str, Any]) -> str:
    """Returns a description of the first missing or changed file, or "" if none is."""
    for name, expected in checksums.items():
        if name not in found:
            return f"{shorten(name)} is missing"
        if _crc32(found[name]) != expected:
            return f"{shorten(name)} has changed since it was written"
    return ""


def _parse(text: bytes) -> tuple[Any, dict[str, Any]]:
    """Returns the step and the checksums, by file name, in `checksums.json`.

    Early files hold only the checksums, and no step: theirs is `_UNKNOWN_STEP`.

    Raises:
      ValueError: the text has another structure.
    """
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("it is no table")
    if "version" not in content:
        content = {"version": _VERSION, "step": _UNKNOWN_STEP, "files": content}
    if content["version"] != _VERSION:
        raise ValueError(
            f"it is of version {shorten(content['version'])}, not {_VERSION}, which "
            "this program reads"
        )
    step, files = content.get("step"), content.get("files")
    if not (isinstance(files, dict) and files):
        raise ValueError("it names no files")
    return step, files


def _files(directory: Path) -> dict[str, Path]:
    """Returns the files below a directory that get a checksum, by relative path."""
    found = {
        path.relative_to(directory).as_posix(): path
        for path in directory.rglob("*")
        if path.is_file()
    }
    for name in (_NAME, _ORBAX_SUCCESS_FILE):
        found.pop(name, None)
    return found


def _crc32(path: Path) -> int:
    if path.name == _ORBAX_METADATA:
        return zlib.crc32(_without_time(path.read_bytes()))
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _without_time(text: bytes) -> bytes:
    """Returns Orbax's metadata without the commit time, in a canonical form."""
    content = _table(text)
    if not content:
        return text  # damaged: its checksum differs from the written one
    content.pop(_ORBAX_TIME, None)
    return json.dumps(content, sort_keys=True).encode()


def _table(text: bytes) -> dict[str, Any]:
    """Returns a table in JSON; an empty one, if the text is something else."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
