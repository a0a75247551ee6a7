"""Names of files and directories that a user gave."""

from pathlib import Path

from train.system.text import shown


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
