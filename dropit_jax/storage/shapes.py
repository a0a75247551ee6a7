"""Shapes of arrays, in which `jax.export` has symbols for sizes that are not known."""

from typing import Any

Shape = tuple[Any, ...]
