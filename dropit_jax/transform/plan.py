"""A plan: the residuals of a dropped function, their bytes, forms and origins."""

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
    """A stored forward value, counted over all iterations of the loops around it.

    Attributes:
      shape: the shape in one iteration.
      dtype: the dtype of the value.
      kind: the class: "kernel", "flowing", "discrete", "small" or "kept".
      form: the stored form: "exact", "1 bit", "8 bits", ...
      turns: the number of iterations; 1 outside loops.
      plain_bytes: the size of the value in bytes, over all iterations.
      nbytes: the size of its stored form in bytes, over all iterations.
      layer: the path of the Flax module or of the scopes around the operation, or else
        its source line; "" for inputs.
      operation: the primitive that makes the value; "input" for inputs.
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

    `print(plan)` shows a table; `drop(fun, plan)` applies the plan.

    Attributes:
      preset: the preset that made the plan.
      choices: (fingerprint, ((value, form), ...)) of each program: its stored values.
      values: the stored values, largest first.
      recomputed: (primitive, number of recomputed equations), the most common first.
      plain_bytes: bytes of the residuals of the plain function.
    """

    preset: Preset
    choices: tuple[tuple[str, tuple[tuple[int, str], ...]], ...]
    values: tuple[StoredValue, ...]
    recomputed: tuple[tuple[str, int], ...]
    plain_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of the residuals that the dropped function stores."""
        return sum(value.nbytes for value in self.values)

    @functools.cached_property
    def forms(self) -> Choices:
        """The choices as nested mappings: fingerprint to value to form."""
        return {
            key: {value: presets.form_of_word(word) for value, word in chosen}
            for key, chosen in self.choices
        }

    def to_json(self) -> str:
        """Returns the plan as text that `from_json` reads."""
        fields = dataclasses.asdict(self)
        fields["preset"] = self.preset.to_dict()
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Returns the plan that `to_json` wrote.

        Raises:
          ValueError: `to_json` did not write the text.
        """
        try:
            fields = json.loads(text)
            plan = cls(
                preset=Preset.from_dict(fields["preset"]),
                choices=_as_tuples(fields["choices"]),
                values=tuple(
                    StoredValue(**value | {"shape": tuple(value["shape"])})
                    for value in fields["values"]
                ),
                recomputed=_as_tuples(fields["recomputed"]),
                plain_bytes=fields["plain_bytes"],
            )
            _ = plan.forms  # an unknown form is an error here
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"Not a plan that to_json wrote: {error!r}") from error
        return plan

    def __str__(self) -> str:
        return table.text(self)

    def __rich__(self) -> Any:
        return table.rich(self)


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def from_choices(preset: Preset, made: list[Choice], plain_bytes: int) -> Plan:
    """Returns the plan of a planner's choices.

    Args:
      preset: the preset of the planner.
      made: the choices of all programs of the function.
      plain_bytes: bytes of the residuals of the plain function.
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
    by_bodies = _stored_by_bodies(choice)  # the choices of the bodies count them
    found = []
    for value, form in choice.forms.items():
        aval, node = program.avals[value], makers.get(value)
        if value in by_bodies:
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
    return scopes.layer_of(scope) or compat.source_line(node.equation)


def _stored_by_bodies(choice: Choice) -> set[int]:
    """Returns the residuals that bodies of loops and the like stored for themselves.

    An equation with a body makes them, and the backward pass reads them only in
    equations with bodies.
    """
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
    """Returns how many equations of each primitive the backward pass recomputes."""
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
