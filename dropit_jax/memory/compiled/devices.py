"""The GPUs that can be compiled for."""

import re
from pathlib import Path

_DESCRIPTIONS = Path(__file__).parents[1] / "targets"


class TargetError(ValueError):
    """There is no description of such a GPU, or it lacks what is asked for."""


def targets() -> list[str]:
    """The names of the GPUs described in this package."""
    return sorted(path.stem for path in _DESCRIPTIONS.glob("*.textproto"))


def target_path(target: str | Path) -> Path:
    """The description of a GPU, given its name or that very path.

    Raises:
      TargetError: the target is unknown.
    """
    path = Path(target)
    if path.is_file():
        return path
    if str(target) in targets():
        return _DESCRIPTIONS / f"{target}.textproto"
    raise TargetError(
        f"Unknown target {str(target)!r}: give one of {', '.join(targets())}, or the "
        "path of a GPU description."
    )


def device_bytes(target: str | Path) -> int:
    """The memory of a GPU.

    Args:
      target: as of `compile_report`.

    Raises:
      TargetError: the target is unknown, or its description does not say.
    """
    description = target_path(target)
    size = re.search(r"device_memory_size: *(\d+)", description.read_text())
    if size is None:
        raise TargetError(f"{description} states no device_memory_size.")
    return int(size[1])
