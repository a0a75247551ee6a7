"""Paths of files and directories that a user typed."""

from pathlib import Path

from train.system.text import shorten


class PathError(ValueError):
    """Raised for a text that cannot be the name of a file."""


def user_path(text: str) -> Path:
    """Returns the path that a user typed, with `~` or `~user` as a home directory.

    The path need not exist. An empty text is the current directory.

    Raises:
      PathError: the text cannot be a path: it is too long, has a zero byte, names an
        unknown user, or leads into a cycle of links.
    """
    try:
        path = Path(text).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return path  # the code that opens the path reports these errors
    except (OSError, RuntimeError, ValueError) as error:
        raise PathError(
            f"{shorten(text)} is no name of a file: {shorten(error)}"
        ) from error
    return path
