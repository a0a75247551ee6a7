"""Chooses the stored values of each program of a function."""

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dropit_jax import compat
from dropit_jax.transform.forms.presets import Preset
from dropit_jax.transform.forms.storage import Form
from dropit_jax.transform.planning import classify, cut, places
from dropit_jax.transform.planning.classify import Classes
from dropit_jax.transform.planning.places import RulePresets
from dropit_jax.transform.planning.prices import Prices
from dropit_jax.transform.tracing import program as programs
from dropit_jax.transform.tracing import split
from dropit_jax.transform.tracing.program import Program

# The fingerprint of each program to its stored values and their forms.
Choices = Mapping[str, Mapping[int, Form]]


class PlanError(ValueError):
    """A plan belongs to another function, or to arguments of other types."""


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """The stored values of one program: the function, or a loop's body or the like.

    Attributes:
      fingerprint: identifies the program in plans.
      halves: the passes of the program.
      classes: the classes of its forward values.
      forms: the form of each stored value.
      turns: how often the program runs: the product of the lengths of the loops around.
      is_recomputed: whether the program is in the body of a `jax.checkpoint`. The
        backward pass runs it again, so its residuals are not held between the passes.
      scope: the path of the scopes around the program.
    """

    fingerprint: str
    halves: split.Split
    classes: Classes
    forms: Mapping[int, Form]
    turns: int
    is_recomputed: bool
    scope: str


class Planner:
    """Plans the programs of one function.

    Attributes:
      preset: the preset, with its rules.
      made: the choices so far, in order.
    """

    def __init__(self, preset: Preset, choices: Choices | None = None) -> None:
        """Makes a planner that has planned no program yet.

        Args:
          preset: the preset, with its rules.
          choices: the choices of a plan, which `choose` looks up. `None`: `choose`
            makes new ones.
        """
        self.preset = preset
        self.made: list[Choice] = []
        self._given = choices
        self._matched: set[str] = set()
        self._places: set[str] = set()

    def choose(
        self,
        halves: split.Split,
        is_free: Sequence[bool],
        final: Sequence[bool],
        turns: int,
        *,
        is_recomputed: bool,
        scope: str,
    ) -> Mapping[int, Form]:
        """Returns the form of each stored value of a program; adds to `made`.

        Args:
          halves: the passes of the program.
          is_free: for each input, whether it stays in memory anyway.
          final: for each gradient, whether no other gradient is computed from it.
          turns: as in `Choice`.
          is_recomputed: as in `Choice`.
          scope: as in `Choice`.

        Raises:
          PlanError: the planner has the choices of a plan, and none for this program.
        """
        classes = classify.classify(halves, halves.backward, is_free, final)
        found = places.find(self.preset, halves.forward, scope)
        self._matched |= found.matched
        self._places |= found.known
        key = _fingerprint(halves, is_free, classes, found)
        forms = self._forms(key, halves.forward, classes, found)
        made = Choice(key, halves, classes, forms, turns, is_recomputed, scope)
        self.made.append(made)
        return forms

    def check_rules(self) -> None:
        """Checks that each rule names a place of the programs planned so far.

        Raises:
          ValueError: a rule names none.
        """
        for pattern, _ in self.preset.rules:
            if pattern not in self._matched:
                known = ", ".join(map(repr, sorted(self._places)[:_SHOWN])) or "none"
                raise ValueError(
                    f"Preset.rules names {pattern!r}, and no scope or checkpoint_name "
                    f"of the function is in it; there are {known}."
                )

    def _forms(
        self, key: str, program: Program, classes: Classes, found: RulePresets
    ) -> Mapping[int, Form]:
        if self._given is not None:
            if key not in self._given:
                raise PlanError(
                    "The plan was made for another function, or for arguments of other "
                    "types: make one for these, with dropit_jax.plan."
                )
            return self._given[key]
        case = key, self.preset
        forms = _cached_forms.get(case)
        if forms is None:
            forms = _cached_forms[case] = _stored_forms(program, classes, found)
            if len(_cached_forms) > _CACHE_SIZE:
                del _cached_forms[next(iter(_cached_forms))]
        return forms


# A function that is not jitted is planned at each call: the cache saves the cut.
_cached_forms: dict[tuple[str, Preset], Mapping[int, Form]] = {}
_CACHE_SIZE = 1024

# The most places that an error names.
_SHOWN = 20


def _stored_forms(
    program: Program, classes: Classes, found: RulePresets
) -> Mapping[int, Form]:
    prices = Prices(program, classes, found)
    stored = cut.stored_values(program, classes, prices.storing, prices.rebuilding)
    return {value: prices.form(value) for value in sorted(stored)}


def _fingerprint(
    halves: split.Split, is_free: Sequence[bool], classes: Classes, found: RulePresets
) -> str:
    """Returns a digest that identifies a program in plans and in `_cached_forms`.

    Programs of equal digest share one choice. The digest is the same in every process,
    as plans are saved. The elements of constant arrays are part of it only through the
    classes of values.
    """
    text = hashlib.sha256()
    for program in (halves.forward, halves.backward):
        for line in _lines(program):
            text.update(line.encode())
    text.update(repr((halves.perturbed, tuple(is_free))).encode())
    text.update(repr([kind.name for kind in classes.kinds]).encode())
    for value, ruled in sorted(found.ruled.items(), key=lambda pair: pair[0]):
        text.update(repr((value, ruled.to_dict())).encode())
    return text.hexdigest()


def _lines(program: Program) -> Any:
    """Yields the program as text: a line for its ends, then a line per equation."""
    given = [(v, str(program.avals[v])) for v in (*program.inputs, *program.constants)]
    yield repr((given, [_atom(a) for a in program.outputs]))
    for node in program.nodes:
        made = [str(program.avals[value]) for value in node.outputs]
        params = sorted((k, _param(v)) for k, v in node.params.items())
        inputs = [_atom(atom) for atom in node.inputs]
        yield f"{node.name} {inputs} {node.outputs} {made} {params}"


def _atom(atom: programs.Atom) -> str:
    return str(atom) if isinstance(atom, int) else repr(atom.val)


def _param(value: Any) -> str:
    """Returns a parameter as text without addresses, which differ by process."""
    if isinstance(value, tuple | list):
        return str([_param(each) for each in value])
    if hasattr(compat.open_jaxpr(value), "eqns"):
        return _ADDRESS.sub("", str(value))
    if callable(value):
        return getattr(value, "__qualname__", type(value).__name__)
    return _ADDRESS.sub("", repr(value))


_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
