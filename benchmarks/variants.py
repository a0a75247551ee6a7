"""The ways to save memory in a training step."""

import dataclasses
from collections.abc import Callable
from typing import Any

from dropit_jax import LayerPreset, drop, layer_preset

Loss = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to save memory.

    Attributes:
      layers: what the layers of the model cache, and whether blocks are recomputed.
      drop: the preset of `dropit_jax.drop` that the loss is differentiated with; empty:
        JAX differentiates it by itself.
    """

    layers: LayerPreset
    drop: str = ""

    def applied(self, loss: Loss) -> Loss:
        """A loss as it is differentiated."""
        return drop(loss, self.drop) if self.drop else loss


_PLAIN = layer_preset("baseline")
_BLOCKS = layer_preset("baseline", remat="blocks")

# The first is what all others are measured against.
VARIANTS: dict[str, Variant] = {
    "baseline": Variant(_PLAIN),
    "drop exact": Variant(_PLAIN, "exact"),
    "drop lean": Variant(_PLAIN, "lean"),
    "drop leanest": Variant(_PLAIN, "leanest"),
    "drop lean+remat_blocks": Variant(_BLOCKS, "lean"),
    # The kept values in the activations' own type, as in the paper.
    "dropit_float32": Variant(layer_preset("dropit", value_dtype=None)),
    "dropit": Variant(layer_preset("dropit")),
    "lean": Variant(layer_preset("lean")),
    "lean+remat_blocks": Variant(layer_preset("lean", remat="blocks")),
    "remat_dots": Variant(layer_preset("baseline", remat="dots")),
    "remat_blocks": Variant(_BLOCKS),
}

# Those that any function has, of whatever it is made.
OF_FUNCTIONS = (
    "baseline",
    "drop exact",
    "drop lean",
    "drop leanest",
    "drop lean+remat_blocks",
    "remat_blocks",
)

# The variants whose steps are timed; the first is what all others are measured against.
TIMED_VARIANTS: dict[str, Variant] = {
    "flax": Variant(_PLAIN),
    "drop exact": Variant(_PLAIN, "exact"),
    "drop lean": Variant(_PLAIN, "lean"),
    "dropit_16": Variant(layer_preset("dropit")),
    "dropit_32": Variant(layer_preset("dropit", chunk_size=32)),
    "dropit_16384": Variant(layer_preset("dropit", chunk_size=2**14)),
    "lean": Variant(layer_preset("lean")),
    "remat_blocks": Variant(_BLOCKS),
    "remat_dots": Variant(layer_preset("baseline", remat="dots")),
}
