"""The step of a checkpoint, and the checksums of its files, in a file of it.

Orbax and TensorStore notice what they cannot parse, but not another value of an array,
nor a directory with the name of another step.
"""

import json
import zlib
from pathlib import Path
from typing import Any

from train.system.files import write_atomically
from train.system.text import shown

_NAME = "checksums.json"
_VERSION = 1
_UNKNOWN = object()
_BLOCK = 2**20

# Orbax completes these after the checksums are written: the first by the time at which
# it gives the directory its name, the second is empty.
_ORBAX_METADATA, _ORBAX_TIME = "_CHECKPOINT_METADATA", "commit_timestamp_nsecs"
_ORBAX_MARK = "commit_success.txt"


def write(directory: Path, step: int) -> None:
    """Writes the step, and the checksums of all files in a directory."""
    files = {name: _crc32(path) for name, path in sorted(_files(directory).items())}
    content = {"version": _VERSION, "step": step, "files": files}
    write_atomically(directory / _NAME, json.dumps(content, indent=1))


def problem(directory: Path, step: int) -> str:
    """Returns what is wrong with the checkpoint of a step; empty if nothing is.

    That is the first file that is missing or has changed, or that the checkpoint is of
    another step.
    """
    try:
        written, checksums = _parse((directory / _NAME).read_bytes())
    except FileNotFoundError:
        if not directory.exists():
            return "it is gone: a run that goes on removes older ones"
        return f"{_NAME} is missing"
    except (OSError, ValueError, RecursionError) as error:
        return f"{_NAME}: {type(error).__name__}: {shown(error)}"
    if written not in (step, _UNKNOWN):
        return f"it was written as that of step {shown(written)}"
    try:
        return _changed(_files(directory), checksums)
    except OSError as error:
        return f"{type(error).__name__}: {shown(error)}"


def _changed(found: dict[str, Path], checksums: dict[str, Any]) -> str:
    """Returns which file, the first, is not as it was written; empty if all are."""
    for name, expected in checksums.items():
        if name not in found:
            return f"{shown(name)} is missing"
        if _crc32(found[name]) != expected:
            return f"{shown(name)} has changed since it was written"
    return ""


def _parse(text: bytes) -> tuple[Any, dict[str, Any]]:
    """The step, which the first version of the file lacks, and the checksums.

    Raises:
      ValueError: they are something else.
    """
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("it is no table")
    if "version" not in content:
        content = {"version": _VERSION, "step": _UNKNOWN, "files": content}
    if content["version"] != _VERSION:
        raise ValueError(
            f"it is of version {shown(content['version'])}, not {_VERSION}, which this "
            "program reads"
        )
    step, files = content.get("step"), content.get("files")
    if not (isinstance(files, dict) and files):
        raise ValueError("it names no files")
    return step, files


def _files(directory: Path) -> dict[str, Path]:
    """The files in a directory that have a checksum, by name."""
    found = {
        path.relative_to(directory).as_posix(): path
        for path in directory.rglob("*")
        if path.is_file()
    }
    for name in (_NAME, _ORBAX_MARK):
        found.pop(name, None)
    return found


def _crc32(path: Path) -> int:
    if path.name == _ORBAX_METADATA:
        return zlib.crc32(_without_time(path.read_bytes()))
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _without_time(text: bytes) -> bytes:
    """Orbax's metadata as they were when the checksums were written."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        return text  # they have changed
    content.pop(_ORBAX_TIME, None)
    return json.dumps(content, sort_keys=True).encode()
