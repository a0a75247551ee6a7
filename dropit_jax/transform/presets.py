"""The presets: what becomes of each class of value."""

import dataclasses
import difflib
from typing import Any

from dropit_jax.transform.storage import Bits, Codes, Exact, Form

_EXACT = Exact()


@dataclasses.dataclass(frozen=True)
class Preset:
    """How values are stored, and at what price they are computed again.

    Attributes:
      name: of the preset that it was made from.
      kernel: how a value is stored that only gradients of parameters depend on.
      flowing: how a value is stored that the gradient of what came before depends on.
      traffic: what a byte costs that is moved to compute a value again, in bytes of
        memory.
    """

    name: str
    kernel: Form = _EXACT
    flowing: Form = _EXACT
    traffic: float = 0.005

    @property
    def is_lossy(self) -> bool:
        """Whether any value is stored with an error."""
        return {self.kernel, self.flowing} != {_EXACT}

    def to_dict(self) -> dict[str, Any]:
        """The fields, forms as their words."""
        words = {"kernel": word(self.kernel), "flowing": word(self.flowing)}
        return {"name": self.name, "traffic": self.traffic, **words}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Preset":
        """The preset whose `to_dict` this is."""
        forms = {name: form(fields[name]) for name in ("kernel", "flowing")}
        return cls(**fields | forms)


_PRESETS = {
    preset.name: preset
    for preset in (
        Preset("exact", traffic=0.02),
        Preset("lean", Codes(8), Codes(8)),
        Preset("leanest", Codes(4), Codes(4)),
    )
}
PRESETS = tuple(_PRESETS)

# By the words that they are given in.
_FORMS: dict[str, Form] = {
    "exact": Exact(),
    "bits": Bits(),
    "int2": Codes(2),
    "int4": Codes(4),
    "int8": Codes(8),
}
_WORDS = {form: word for word, form in _FORMS.items()}


def form(word: str) -> Form:
    """The form that a word stands for.

    Raises:
      ValueError: there is no such form.
    """
    if word not in _FORMS:
        known = ", ".join(map(repr, _FORMS))
        raise ValueError(f"Unknown form {word!r}; known are {known}.")
    return _FORMS[word]


def word(form: Form) -> str:
    """The word that stands for a form."""
    return _WORDS[form]


def preset(name: str, **fields: Any) -> Preset:
    """The preset of a name, some of its fields changed.

    Args:
      name: "exact", "lean" or "leanest".
      **fields: of `Preset`; `kernel` and `flowing` also as "exact", "int8", "int4" or
        "int2".

    Raises:
      TypeError: there is no such field.
      ValueError: there is no such preset or form.
    """
    if not isinstance(name, str) or name not in _PRESETS:
        near = difflib.get_close_matches(str(name), PRESETS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        known = ", ".join(map(repr, PRESETS))
        raise ValueError(f"Unknown preset {name!r}; known are {known}.{hint}")
    for field in ("kernel", "flowing"):
        if isinstance(fields.get(field), str):
            fields[field] = form(fields[field])
    return dataclasses.replace(_PRESETS[name], **fields)
