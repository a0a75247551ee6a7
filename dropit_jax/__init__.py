"""`drop` makes any JAX function store less for its backward pass; layers of DropIT."""

import importlib
from typing import TYPE_CHECKING, Any

from dropit_jax.policy import DropIT
from dropit_jax.products.operations import conv_general_dilated, dot_general, einsum
from dropit_jax.storage.residual import Residual, compress

if TYPE_CHECKING:
    from dropit_jax import linen, memory, nn, nnx
    from dropit_jax.transform.drop import drop, plan
    from dropit_jax.transform.forms.presets import PRESETS, Preset, preset
    from dropit_jax.transform.plan import Plan
    from dropit_jax.transform.planning.planner import PlanError

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "DropIT",
    "Plan",
    "PlanError",
    "Preset",
    "Residual",
    "compress",
    "conv_general_dilated",
    "dot_general",
    "drop",
    "einsum",
    "linen",
    "memory",
    "nn",
    "nnx",
    "plan",
    "preset",
]

# Imported when they are first asked for: packages that import Flax, and names of
# modules that import SciPy.
_PACKAGES = frozenset({"linen", "memory", "nn", "nnx"})
_NAMES = {
    "PRESETS": "forms.presets",
    "Plan": "plan",
    "PlanError": "planning.planner",
    "Preset": "forms.presets",
    "drop": "drop",
    "plan": "drop",
    "preset": "forms.presets",
}


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _NAMES:
        module = importlib.import_module(f"{__name__}.transform.{_NAMES[name]}")
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
