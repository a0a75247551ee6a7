"""Checksums of the files in a directory, which tell that one has changed.

Orbax and TensorStore notice what they cannot parse, but not another value of an array.
"""

import json
import zlib
from pathlib import Path

from train.files import write_atomically

_NAME = "checksums.json"
_BLOCK = 2**20


def write(directory: Path, parts: tuple[str, ...]) -> None:
    """Writes the checksums of all files in some of the directory's directories."""
    checksums = {
        str(path.relative_to(directory)): _crc32(path)
        for part in parts
        for path in sorted((directory / part).rglob("*"))
        if path.is_file()
    }
    write_atomically(directory / _NAME, json.dumps(checksums, indent=1) + "\n")


def problem(directory: Path) -> str:
    """The first file that is missing or has changed; empty if there is none.

    Where there are no checksums, nothing is known.
    """
    path = directory / _NAME
    if not path.exists():
        return ""
    try:
        checksums = json.loads(path.read_text())
        for name, expected in checksums.items():
            file = directory / name
            if not file.exists():
                return f"{name} is missing"
            if _crc32(file) != expected:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum
