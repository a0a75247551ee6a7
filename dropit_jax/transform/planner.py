"""Chooses what is stored of each program of a function: classes, prices, the cut."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from dropit_jax import compat
from dropit_jax.transform import classify, cut, prices, split
from dropit_jax.transform import program as programs
from dropit_jax.transform.classify import Classes
from dropit_jax.transform.presets import Preset
from dropit_jax.transform.program import Node, Program
from dropit_jax.transform.storage import Form

# Of each program by its fingerprint: the stored values, and how.
Choices = Mapping[str, Mapping[int, Form]]


class PlanError(ValueError):
    """A plan is of another function, or of arguments of other types."""


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """What is stored of one program: of the function, or of a body in it.

    Attributes:
      fingerprint: of the program.
      halves: its passes.
      classes: of its values.
      forms: of each stored value.
      turns: how often the program runs: the length of the loops around it.
      is_recomputed: whether the backward pass runs the program again, as the body of a
        `jax.checkpoint`, so that what it stores does not last until then.
    """

    fingerprint: str
    halves: split.Halves
    classes: Classes
    forms: Mapping[int, Form]
    turns: int
    is_recomputed: bool


class Planner:
    """Plans the programs of one function.

    Attributes:
      preset: what is stored.
      made: the choices so far, in order.
    """

    def __init__(self, preset: Preset, choices: Choices | None = None) -> None:
        self.preset = preset
        self.made: list[Choice] = []
        self._given = choices

    def choose(
        self,
        halves: split.Halves,
        is_free: Sequence[bool],
        final: Sequence[bool],
        turns: int,
        *,
        is_recomputed: bool,
    ) -> Mapping[int, Form]:
        """How each stored value of a program is stored.

        Args:
          halves: of the program.
          is_free: of each input, whether it is alive anyway.
          final: of each gradient, whether nothing is computed from it.
          turns: how often the program runs.
          is_recomputed: as in `Choice`.
        """
        classes = classify.classify(halves, halves.backward, is_free, final)
        key = _fingerprint(halves, is_free)
        forms = self._forms(key, halves.forward, classes)
        self.made.append(Choice(key, halves, classes, forms, turns, is_recomputed))
        return forms

    def _forms(
        self, key: str, program: Program, classes: Classes
    ) -> Mapping[int, Form]:
        if self._given is not None:
            if key not in self._given:
                raise PlanError(
                    "The plan is of another function, or of arguments of other types: "
                    "make it of these, with dropit_jax.plan."
                )
            return self._given[key]
        known = _known.get((key, self.preset))
        if known is None:
            known = _known[key, self.preset] = _cut(self.preset, program, classes)
            if len(_known) > _MOST:
                del _known[next(iter(_known))]
        return known


# A function that is not jitted is planned at each call, and cut at the first.
_known: dict[tuple[str, Preset], Mapping[int, Form]] = {}
_MOST = 1024


def _cut(preset: Preset, program: Program, classes: Classes) -> Mapping[int, Form]:
    def storing(value: int) -> float:
        return prices.storing(preset, classes.kinds[value], program.avals[value])

    def rebuilding(node: Node) -> float:
        return prices.rebuilding(preset, classes, program, node)

    stored = cut.stored_values(program, classes, storing, rebuilding)
    return {
        value: prices.form(preset, classes.kinds[value], program.avals[value])
        for value in sorted(stored)
    }


def _fingerprint(halves: split.Halves, is_free: Sequence[bool]) -> str:
    """Equal for programs for which the same is chosen, in any process."""
    text = hashlib.sha256()
    for program in (halves.forward, halves.backward):
        for line in _lines(program):
            text.update(line.encode())
    text.update(repr((halves.perturbed, tuple(is_free))).encode())
    return text.hexdigest()


def _lines(program: Program) -> Any:
    yield repr((program.inputs, [_atom(a) for a in program.outputs]))
    for node in program.nodes:
        made = [str(program.avals[value]) for value in node.outputs]
        params = sorted((k, _param(v)) for k, v in node.params.items())
        inputs = [_atom(atom) for atom in node.inputs]
        yield f"{node.name} {inputs} {node.outputs} {made} {params}"


def _atom(atom: programs.Atom) -> str:
    return str(atom) if isinstance(atom, int) else repr(atom.val)


def _param(value: Any) -> str:
    """A parameter without addresses in memory, which differ from process to process."""
    if isinstance(value, tuple | list):
        return str([_param(each) for each in value])
    if hasattr(compat.open_jaxpr(value), "eqns"):
        return str(value)
    if callable(value):
        return getattr(value, "__qualname__", type(value).__name__)
    text = repr(value)
    return type(value).__name__ if " at 0x" in text else text
