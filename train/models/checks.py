"""Checks the fields of models."""

from collections.abc import Collection
from typing import Any


def check_choice(field: str, value: Any, known: Collection[str]) -> None:
    """Checks that the value of a field is a known one.

    Raises:
      ValueError: the value is unknown.
    """
    if value not in known:
        raise ValueError(
            f"{field}: unknown value {value!r}; known are "
            f"{', '.join(map(repr, known))}."
        )


def check_rate(field: str, value: float) -> None:
    """Checks that the value of a field is in [0, 1).

    Raises:
      ValueError: the value is outside.
    """
    if not 0 <= value < 1:
        raise ValueError(f"{field}: must be in [0, 1), got {value!r}.")
