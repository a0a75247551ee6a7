"""Files that are whole or absent, and their names."""

import os
from pathlib import Path

from train.text import shown


class PathError(ValueError):
    """A text that cannot be the name of a file."""


def named(text: str) -> Path:
    """The path that a user named; `~` stands for a home directory.

    Raises:
      PathError: it is too long, has a zero byte, or is of a user that there is not.
    """
    try:
        path = Path(text).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return path  # which is told where it is used
    except (OSError, RuntimeError, ValueError) as error:
        raise PathError(
            f"{shown(text)} is no name of a file: {shown(error)}"
        ) from error
    return path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file so that a reader, or a crash, sees the old one or the new one.

    Of several processes that write it, one is the last.
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
