"""Checks of what a model is told."""

from collections.abc import Collection
from typing import Any


def check_choice(field: str, value: Any, known: Collection[str]) -> None:
    """Raises a ValueError, which names the field, if the value is not known."""
    if value not in known:
        raise ValueError(
            f"{field}: unknown value {value!r}; known are "
            f"{', '.join(map(repr, known))}."
        )


def check_rate(field: str, value: float) -> None:
    """Raises a ValueError, which names the field, if all would be dropped, or less."""
    if not 0 <= value < 1:
        raise ValueError(f"{field}: must be in [0, 1), got {value!r}.")
