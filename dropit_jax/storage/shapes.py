"""The type of array shapes, whose sizes `jax.export` may represent by symbols."""

from typing import Any

Shape = tuple[Any, ...]
