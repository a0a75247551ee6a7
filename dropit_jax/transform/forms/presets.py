"""The presets: the form in which each class of value is stored."""

import dataclasses
import difflib
import json
import numbers
from collections.abc import Iterable
from typing import Any

from dropit_jax.policy import DropIT
from dropit_jax.transform.forms.storage import Bits, Codes, Exact, Form, Selected

# A form, the word for one ("exact", "int8", "int4", "int2"), or a policy.
FormLike = str | DropIT | Form


@dataclasses.dataclass(frozen=True)
class Preset:
    """The forms of stored values, and the price of recomputing them.

    Attributes:
      name: the name of the preset that this one was made from.
      kernel: the form of values on which only gradients of parameters depend: "exact",
        "int8", "int4", "int2" or a `DropIT` policy.
      flowing: the form of values on which gradients of earlier layers depend: "exact",
        "int8", "int4" or "int2".
      traffic: the price of moving one byte in order to recompute a value, in bytes of
        memory. The lower it is, the more values are recomputed.
      rules: presets for named places, such as `{"head": "exact"}`. A key is a scope (of
        a Flax module, or `jax.named_scope`), several scopes joined by "/", or a
        `checkpoint_name`; `*` matches any text. A value is a `Preset` without rules,
        the name of one, or the word for a form of both classes. A rule holds for the
        values that its place reads and computes; of several rules for a value the first
        holds. The attribute is a tuple of pairs.

    Raises:
      TypeError: a field has the wrong type.
      ValueError: a form or preset does not exist, `flowing` is a policy, or `traffic`
        is negative or no number.
    """

    name: str
    kernel: FormLike = "exact"
    flowing: FormLike = "exact"
    traffic: float = 0.005
    rules: Any = ()

    def __post_init__(self) -> None:
        if isinstance(self.flowing, DropIT | Selected):
            raise ValueError(
                "Preset.flowing takes no policy: the gradients of earlier layers would "
                "be those of dropped elements. A policy is for kernel=..."
            )
        for field in ("kernel", "flowing"):
            object.__setattr__(self, field, form(getattr(self, field), field))
        if not isinstance(self.traffic, numbers.Real) or not self.traffic >= 0:
            raise ValueError(
                f"Preset.traffic must be a number, 0 or more, got {self.traffic!r}."
            )
        object.__setattr__(self, "rules", tuple(self._rules(self.rules)))

    def _rules(self, rules: Any) -> Iterable[tuple[str, "Preset"]]:
        """Yields the checked rules as (pattern, preset)."""
        try:
            pairs = [*dict(rules).items()]
        except (TypeError, ValueError):
            pairs = [(None, None)]
        for place, treatment in pairs:
            if not isinstance(place, str) or not place.strip("/"):
                raise TypeError(
                    "Preset.rules maps scopes or names to presets, such as "
                    f'{{"head": "exact"}}; got {rules!r}.'
                )
            yield place, self._treatment(place, treatment)

    def _treatment(self, place: str, given: Any) -> "Preset":
        if isinstance(given, str) and given in _FORMS:
            return Preset(given, given, given, self.traffic)
        found = preset(given) if isinstance(given, str) else given
        if not isinstance(found, Preset) or found.rules:
            raise TypeError(
                f"Preset.rules[{place!r}] takes a preset without rules, the name of "
                f"one, or a form; got {given!r}."
            )
        return found

    @property
    def all(self) -> tuple["Preset", ...]:
        """The preset itself, and the presets of its rules."""
        return (self, *(treatment for _, treatment in self.rules))

    @property
    def needs_key(self) -> bool:
        """Returns whether a policy of the preset or its rules draws random numbers."""
        return any(each.kernel.needs_key for each in self.all)  # type: ignore[union-attr]

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields for JSON, forms as words; `from_dict` reads them."""
        return {
            "name": self.name,
            "kernel": word(self.kernel),
            "flowing": word(self.flowing),
            "traffic": float(self.traffic),
            "rules": {place: each.to_dict() for place, each in self.rules},
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Preset":
        """Returns the preset that `to_dict` wrote."""
        words = {name: form_of_word(fields[name]) for name in ("kernel", "flowing")}
        rules = {place: cls.from_dict(each) for place, each in fields["rules"].items()}
        return cls(**fields | words | {"rules": rules})


# The forms that users name.
_FORMS: dict[str, Form] = {
    "exact": Exact(),
    "int8": Codes(8),
    "int4": Codes(4),
    "int2": Codes(2),
}
_WORDS = {form: word for word, form in (_FORMS | {"bits": Bits()}).items()}
_POLICY = "DropIT "


def form(given: Any, field: str = "form") -> Form:
    """Returns the form for a word, a policy, or a form itself.

    Args:
      given: a word ("exact", "int8", "int4", "int2"), a policy, or the form of one.
      field: the field of `Preset` that an error names.

    Raises:
      TypeError: `given` is none of these.
      ValueError: the word names no form.
    """
    if isinstance(given, DropIT):
        return Selected(given)
    if isinstance(given, Selected) or any(given == each for each in _FORMS.values()):
        return given
    known = ", ".join(map(repr, _FORMS))
    if not isinstance(given, str):
        raise TypeError(
            f"Preset.{field} takes one of {known} or a DropIT policy, got {given!r}."
        )
    if given not in _FORMS:
        raise ValueError(f"Unknown form {given!r} for Preset.{field}; known: {known}.")
    return _FORMS[given]


def word(form: Any) -> str:
    """Returns a form as text: "int8", "bits", `DropIT {"rate": 0.875, ...}`."""
    if isinstance(form, Selected):
        return _POLICY + json.dumps(dataclasses.asdict(form.policy))
    return _WORDS[form]


def form_of_word(word: str) -> Form:
    """Returns the form of a text that the function `word` returned.

    Raises:
      KeyError: no form has this text.
    """
    if word.startswith(_POLICY):
        return Selected(DropIT(**json.loads(word.removeprefix(_POLICY))))
    return {text: form for form, text in _WORDS.items()}[word]


# As in the paper, but with kept elements in bfloat16: beside the error of dropping the
# others, its rounding does not matter, and they take half the bytes.
_PAPER = DropIT(value_dtype="bfloat16")

_PRESETS = {
    each.name: each
    for each in (
        Preset("exact", traffic=0.02),
        Preset("dropit", kernel=_PAPER, traffic=0.02),
        Preset("lean", "int8", "int8"),
        Preset("leanest", "int4", "int4"),
    )
}
PRESETS = tuple(_PRESETS)


def preset(name: str, **fields: Any) -> Preset:
    """Returns a preset by its name, with some fields changed.

    Args:
      name: "exact" (no error), "dropit" (the paper: the largest elements of kernel
        values), "lean" (8 bits) or "leanest" (4 bits).
      **fields: new values of fields of `Preset`, such as `kernel="int4"`.

    Raises:
      TypeError: a field does not exist, or has the wrong type.
      ValueError: the preset does not exist, or `Preset` refuses the value of a field.
    """
    if not isinstance(name, str) or name not in _PRESETS:
        near = difflib.get_close_matches(str(name), PRESETS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        known = ", ".join(map(repr, PRESETS))
        raise ValueError(f"Unknown preset {name!r}; known are {known}.{hint}")
    names = [each.name for each in dataclasses.fields(Preset)][1:]
    for field in fields:
        if field not in names:
            near = difflib.get_close_matches(field, names, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise TypeError(
                f"Preset has no field {field!r}; it has {', '.join(names)}.{hint}"
            )
    return dataclasses.replace(_PRESETS[name], **fields)
