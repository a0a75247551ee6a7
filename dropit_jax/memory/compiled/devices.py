"""Finds the descriptions of the GPUs that can be compiled for."""

import re
from pathlib import Path

_DESCRIPTIONS = Path(__file__).parents[1] / "targets"


class TargetError(ValueError):
    """A GPU has no description, or the description lacks its memory size."""


def targets() -> list[str]:
    """Returns the names of the GPUs described in this package."""
    return sorted(path.stem for path in _DESCRIPTIONS.glob("*.textproto"))


def target_path(target: str | Path) -> Path:
    """Returns the path of the description of a GPU.

    Args:
      target: the path itself, which is returned unchanged if it is a file, or else a
        name from `targets()`.

    Raises:
      TargetError: the target is unknown.
    """
    path = Path(target)
    if path.is_file():
        return path.absolute()  # the process that compiles has its own directory
    if str(target) in targets():
        return _DESCRIPTIONS / f"{target}.textproto"
    raise TargetError(
        f"Unknown target {str(target)!r}: give one of {', '.join(targets())}, or the "
        "path of a GPU description."
    )


def device_bytes(target: str | Path) -> int:
    """Returns the memory of a GPU, in bytes.

    Args:
      target: a name from `targets()`, or the path of a description.

    Raises:
      TargetError: the target is unknown, or its description has no memory size.
    """
    description = target_path(target)
    size = re.search(r"device_memory_size: *(\d+)", description.read_text())
    if size is None:
        raise TargetError(f"{description} states no device_memory_size.")
    return int(size[1])
