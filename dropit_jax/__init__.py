"""DropIT: cache less of what the backward pass of a Flax model reads."""

import importlib
from typing import TYPE_CHECKING, Any

from dropit_jax.ops import conv_general_dilated, dot_general, einsum
from dropit_jax.policy import DropIT
from dropit_jax.presets import PRESETS, Preset, preset
from dropit_jax.residual import Residual, compress

if TYPE_CHECKING:
    from dropit_jax import linen, memory, nn, nnx

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "DropIT",
    "Preset",
    "Residual",
    "compress",
    "conv_general_dilated",
    "dot_general",
    "einsum",
    "linen",
    "memory",
    "nn",
    "nnx",
    "preset",
]

# Imported when they are first asked for, as they import Flax.
_PACKAGES = frozenset({"linen", "memory", "nn", "nnx"})


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
