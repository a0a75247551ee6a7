"""A plan: what a function stores between its two passes, how, and why."""

import collections
import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

from dropit_jax import compat
from dropit_jax.memory.traced import scopes
from dropit_jax.transform import table
from dropit_jax.transform.forms import presets
from dropit_jax.transform.forms.presets import Preset
from dropit_jax.transform.planning.planner import Choice, Choices
from dropit_jax.transform.tracing import primitives
from dropit_jax.transform.tracing import program as programs
from dropit_jax.transform.tracing.program import Node


@dataclasses.dataclass(frozen=True)
class StoredValue:
    """A value that is stored, in all turns of the loops that it is in.

    Attributes:
      shape: of the value, in one turn.
      dtype: of the value.
      kind: its class: "kernel", "flowing", "discrete", "small" or "kept".
      form: how it is stored: "exact", "1 bit", "8 bits", ...
      turns: how often.
      plain_bytes: the size of the value, in all turns.
      nbytes: the size of what is stored of it, in all turns.
      layer: the path of the Flax module, or of the scopes, that make it; else the
        source line; "" for inputs.
      operation: the primitive that makes it; "input" if none does.
    """

    shape: tuple[int, ...]
    dtype: str
    kind: str
    form: str
    turns: int
    plain_bytes: int
    nbytes: int
    layer: str
    operation: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """The values that a function stores for its backward pass.

    Printed, it is a table. `drop(fun, plan)` uses it again.

    Attributes:
      preset: that it was made with.
      choices: of each program, by its fingerprint, the stored values and their forms.
      values: what is stored, largest first.
      recomputed: by primitive, how many equations are computed again.
      plain_bytes: what the plain function stores.
    """

    preset: Preset
    choices: tuple[tuple[str, tuple[tuple[int, str], ...]], ...]
    values: tuple[StoredValue, ...]
    recomputed: tuple[tuple[str, int], ...]
    plain_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes that the function stores."""
        return sum(value.nbytes for value in self.values)

    @functools.cached_property
    def forms(self) -> Choices:
        """The choices as the planner takes them."""
        return {
            key: {value: presets.of_word(word) for value, word in chosen}
            for key, chosen in self.choices
        }

    def to_json(self) -> str:
        """The plan as text, for `from_json`."""
        fields = dataclasses.asdict(self)
        fields["preset"] = self.preset.to_dict()
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The plan that `to_json` wrote.

        Raises:
          ValueError: the text is no such plan.
        """
        try:
            fields = json.loads(text)
            return cls(
                preset=Preset.from_dict(fields["preset"]),
                choices=_as_tuples(fields["choices"]),
                values=tuple(
                    StoredValue(**value | {"shape": tuple(value["shape"])})
                    for value in fields["values"]
                ),
                recomputed=_as_tuples(fields["recomputed"]),
                plain_bytes=fields["plain_bytes"],
            )
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"Not a plan that to_json wrote: {error!r}") from error

    def __str__(self) -> str:
        return table.text(self)

    def __rich__(self) -> Any:
        return table.rich(self)


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def of_choices(preset: Preset, made: list[Choice], plain_bytes: int) -> Plan:
    """The plan that a planner made.

    Args:
      preset: that it was made with.
      made: the choices.
      plain_bytes: what the plain function stores.
    """
    values: list[StoredValue] = []
    recomputed: collections.Counter[str] = collections.Counter()
    for choice in made:
        if not choice.is_recomputed:
            values += _stored(choice)
        recomputed.update(_recomputed(choice))
    values.sort(key=lambda value: -value.nbytes)
    choices = {
        choice.fingerprint: tuple(
            (value, presets.word(form)) for value, form in choice.forms.items()
        )
        for choice in made
    }
    return Plan(
        preset,
        tuple(sorted(choices.items())),
        tuple(values),
        tuple(recomputed.most_common()),
        plain_bytes,
    )


def _stored(choice: Choice) -> list[StoredValue]:
    program = choice.halves.forward
    makers = program.makers()
    elsewhere = _of_bodies(choice)  # in the choices for these bodies
    found = []
    for value, form in choice.forms.items():
        aval, node = program.avals[value], makers.get(value)
        if value in elsewhere:
            continue
        found.append(
            StoredValue(
                shape=programs.sized(aval).shape,
                dtype=str(aval.dtype),
                kind=choice.classes.kinds[value].value,
                form=str(form),
                turns=choice.turns,
                plain_bytes=choice.turns * programs.nbytes(aval),
                nbytes=choice.turns * int(form.nbytes(programs.sized(aval))),
                layer=_layer(choice, node) if node else "",
                operation=node.name if node else "input",
            )
        )
    return found


def _layer(choice: Choice, node: Node) -> str:
    scope = f"{choice.scope}/{node.equation.source_info.name_stack}"
    return scopes.layer(scope) or compat.source_line(node.equation)


def _of_bodies(choice: Choice) -> set[int]:
    """The values that bodies store: the backward pass gives them to bodies alone."""
    backward, residuals = choice.halves.backward, choice.halves.residuals
    places = dict(zip(backward.inputs, residuals, strict=False))
    makers = choice.halves.forward.makers()
    found = {
        value
        for value in programs.values(residuals)
        if value in makers and makers[value].name in primitives.BODIES
    }
    for node in backward.nodes:
        if node.name not in primitives.BODIES:
            found -= {places.get(value) for value in node.operands}
    return found


def _recomputed(choice: Choice) -> Mapping[str, int]:
    """The equations that are computed again, by primitive."""
    makers = choice.halves.forward.makers()
    counted: dict[Any, str] = {}
    todo = list(programs.values(choice.halves.residuals))
    seen = set(choice.forms)
    while todo:
        value = todo.pop()
        if value in seen or value not in makers:
            continue
        seen.add(value)
        counted[makers[value]] = makers[value].name
        todo.extend(makers[value].operands)
    return collections.Counter(counted.values())
