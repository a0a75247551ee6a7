"""The ways to save memory in a training step."""

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
    """A way to save memory.

    Attributes:
      preset: the preset of `dropit_jax.drop` around the loss; empty: the plain loss.
      policy: the policy of DropIT layers; `None`: Flax's layers.
      remat: the blocks that `jax.checkpoint` recomputes, as in `train.models.layers`.
    """

    preset: str = ""
    policy: DropIT | None = None
    remat: Remat = "none"

    @property
    def layers(self) -> Layers:
        """The layers that the model is built of."""
        return layers.FLAX if self.policy is None else layers.dropit(self.policy)

    def model(self, make: Callable[..., Any]) -> Any:
        """Returns a model, made with these layers."""
        return make(layers=self.layers, remat=self.remat)

    def applied(self, loss: Loss) -> Loss:
        """Returns the loss as the step differentiates it."""
        return dropit_jax.drop(loss, self.preset) if self.preset else loss


# The paper's policy, but for the type of the kept values, as in the preset "dropit".
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
    # The kept values in the activations' own type, as in the paper.
    "dropit_layers_float32": Variant(policy=_layers(value_dtype=None)),
    "dropit_layers": Variant(policy=_POLICY),
    "remat_dots": Variant(remat="dots"),
    "remat_blocks": Variant(remat="blocks"),
}

# The variants of functions without layers.
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
    # DropIT layers with chunks of so many elements.
    "dropit_16": Variant(policy=_POLICY),
    "dropit_32": Variant(policy=_layers(chunk_size=32)),
    "dropit_16384": Variant(policy=_layers(chunk_size=2**14)),
    "remat_blocks": Variant(remat="blocks"),
    "remat_dots": Variant(remat="dots"),
}
