"""Named levels of saving memory: what a whole model caches, and what it recomputes."""

import dataclasses
import difflib
from typing import Any, Literal, get_args

from dropit_jax.policy import DropIT, check_policy

Remat = Literal["none", "blocks", "dots"]
REMATS: tuple[Remat, ...] = get_args(Remat)


@dataclasses.dataclass(frozen=True)
class LayerPreset:
    """What a model caches for its backward pass.

    Attributes:
      name: of the preset that it was made from.
      dropit: what dense layers keep of their inputs; `None`: all.
      conv: what convolutions keep of theirs; `None`: all.
      one_bit: whether functions whose gradient stays exact cache bits: the rectifiers,
        dropout and max-pooling.
      eight_bit: whether the other activation functions and the norms cache 8 bits, and
        attention recomputes its scores.
      remat: what `jax.checkpoint` does on top: `"none"`, `"blocks"` (every block of the
        model is recomputed in the backward pass), or `"dots"` (the same, but for the
        outputs of dense layers, which are kept: the policy
        `dots_with_no_batch_dims_saveable`).

    Raises:
      TypeError: `dropit` is not a policy.
      ValueError: there is no such `remat`.
    """

    name: str
    dropit: DropIT | None = None
    conv: DropIT | None = None
    one_bit: bool = False
    eight_bit: bool = False
    remat: Remat = "none"

    def __post_init__(self) -> None:
        for policy in (self.dropit, self.conv):
            if policy is not None:
                check_policy(policy)
        if self.remat not in REMATS:
            raise ValueError(
                f"LayerPreset.remat: unknown value {self.remat!r}; known are "
                f"{', '.join(map(repr, REMATS))}."
            )

    @property
    def for_vectors(self) -> "LayerPreset":
        """The same for layers that read one vector a sample, as a model's head does.

        There is no mean over positions to rebuild such an input with: what is dropped
        of it is zero.
        """
        return dataclasses.replace(
            self,
            dropit=_zero_filled(self.dropit),
            conv=_zero_filled(self.conv),
        )


def _zero_filled(policy: DropIT | None) -> DropIT | None:
    return None if policy is None else dataclasses.replace(policy, fill="zero")


# As in the paper, but for the kept values' type: in half the bytes they lose nothing
# beside what is dropped.
_PAPER = DropIT(value_dtype="bfloat16")

# Everything in few bits: at equal size they carry more of the gradient than all bits of
# few elements. Two bits do where most inputs are a rectifier's: half of these
# are 0, which has a code of its own. What a norm or a GELU gives is spread evenly.
_FOUR_BITS = DropIT(rate=0, value_dtype="int4")
_TWO_BITS = DropIT(rate=0, value_dtype="int2")

_PRESETS = {
    preset.name: preset
    for preset in (
        LayerPreset("baseline"),
        LayerPreset("dropit", _PAPER, _PAPER, one_bit=True),
        LayerPreset("lean", _FOUR_BITS, _TWO_BITS, one_bit=True, eight_bit=True),
    )
}
LAYER_PRESETS = tuple(_PRESETS)


def layer_preset(name: str, *, remat: Remat = "none", **dropit: Any) -> LayerPreset:
    """The preset of a name.

    Args:
      name: `"baseline"`, plain Flax; `"dropit"`, dense layers and convolutions as in
        the paper, and one-bit activations, without which these save little; `"lean"`,
        everything that has a compact residual.
      remat: as in `LayerPreset`.
      **dropit: fields of the preset's policies to be changed, such as `rate=0.5`.

    Raises:
      TypeError: there is no such field, or its value has the wrong type.
      ValueError: there is no such preset, it has no policy to change, or a field's
        value is out of range.
    """
    if not isinstance(name, str) or name not in _PRESETS:
        near = difflib.get_close_matches(str(name), LAYER_PRESETS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        known = ", ".join(map(repr, LAYER_PRESETS))
        raise ValueError(f"Unknown preset {name!r}; known are {known}.{hint}")
    chosen = dataclasses.replace(_PRESETS[name], remat=remat)
    if not dropit:
        return chosen
    names = [field.name for field in dataclasses.fields(DropIT)]
    for field in dropit:
        if field not in names:
            near = difflib.get_close_matches(field, names, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise TypeError(
                f"DropIT has no field {field!r}; it has {', '.join(names)}.{hint}"
            )
    if chosen.dropit is None or chosen.conv is None:
        raise ValueError(
            f"The preset {name!r} has no policy, so {', '.join(dropit)} cannot be set."
        )
    return dataclasses.replace(
        chosen,
        dropit=dataclasses.replace(chosen.dropit, **dropit),
        conv=dataclasses.replace(chosen.conv, **dropit),
    )
