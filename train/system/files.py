"""Atomic writing of files: a file is complete or absent."""

import os
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file atomically: readers see the old or the new content, never a part.

    A crash leaves one of the two as well. When several processes write the same file,
    the last one wins.

    Raises:
      OSError: the file cannot be written; the old content stays.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    data = content.encode() if isinstance(content, str) else content
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
