"""The variants of a training step: presets, DropIT layers and recomputation."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import dropit_jax
from dropit_jax import DropIT
from train.models import layers
from train.models.layers import Layers, Remat

Loss = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to save memory in a training step.

    Attributes:
      preset: the preset of `dropit_jax.drop` for the loss; "": the plain loss.
      policy: the policy of DropIT layers; `None`: Flax's layers.
      remat: the blocks that `jax.checkpoint` recomputes, as in `train.models.layers`.
    """

    preset: str = ""
    policy: DropIT | None = None
    remat: Remat = "none"

    @property
    def layers(self) -> Layers:
        """The layers of which the model is built."""
        return layers.FLAX if self.policy is None else layers.dropit(self.policy)

    def model(self, make: Callable[..., Any]) -> Any:
        """Returns `make(layers=..., remat=...)`, the model of this variant."""
        return make(layers=self.layers, remat=self.remat)

    def applied(self, loss: Loss) -> Loss:
        """Returns the loss with the preset, which the step differentiates."""
        return dropit_jax.drop(loss, self.preset) if self.preset else loss


# The paper's policy, except that kept values are bfloat16, as in the preset "dropit".
_POLICY = DropIT(value_dtype="bfloat16")
_layers = functools.partial(dataclasses.replace, _POLICY)

# The first is the baseline of the others.
VARIANTS: dict[str, Variant] = {
    "baseline": Variant(),
    "exact": Variant("exact"),
    "dropit": Variant("dropit"),
    "lean": Variant("lean"),
    "leanest": Variant("leanest"),
    "lean+remat_blocks": Variant("lean", remat="blocks"),
    # Kept values in the activation's dtype, as in the paper.
    "dropit_layers_float32": Variant(policy=_layers(value_dtype=None)),
    "dropit_layers": Variant(policy=_POLICY),
    "remat_dots": Variant(remat="dots"),
    "remat_blocks": Variant(remat="blocks"),
}

# The variants for functions without layers.
OF_FUNCTIONS = (
    "baseline",
    "exact",
    "lean",
    "leanest",
    "lean+remat_blocks",
    "remat_blocks",
)

# The variants whose steps are timed; the first is the baseline of the others.
TIMED_VARIANTS: dict[str, Variant] = {
    "flax": Variant(),
    "exact": Variant("exact"),
    "lean": Variant("lean"),
    # DropIT layers; the number is the size of a chunk.
    "dropit_16": Variant(policy=_POLICY),
    "dropit_32": Variant(policy=_layers(chunk_size=32)),
    "dropit_16384": Variant(policy=_layers(chunk_size=2**14)),
    "remat_blocks": Variant(remat="blocks"),
    "remat_dots": Variant(remat="dots"),
}
