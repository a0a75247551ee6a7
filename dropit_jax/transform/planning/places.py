"""Finds the preset of each value: that of a rule which names its place, if any."""

import dataclasses
import fnmatch
import functools
from collections.abc import Iterator

from dropit_jax import compat
from dropit_jax.memory.traced import scopes
from dropit_jax.transform.forms.presets import Preset
from dropit_jax.transform.planning import classify
from dropit_jax.transform.tracing.program import Node, Program


@dataclasses.dataclass(frozen=True)
class RulePresets:
    """The presets of the values of a program, indexed by the number of a value.

    A place is a scope, such as "encoder/layer_0/mlp", or a `checkpoint_name`.

    Attributes:
      default: the preset of values that no rule names.
      ruled: the rule's preset of each other value.
      matched: the patterns of the rules that name a place of the program.
      known: the places of the program; empty if the preset has no rules.
    """

    default: Preset
    ruled: dict[int, Preset]
    matched: frozenset[str]
    known: frozenset[str]

    def __getitem__(self, value: int) -> Preset:
        return self.ruled.get(value, self.default)

    def may_rebuild(self, node: Node, lossy: set[int]) -> bool:
        """Returns whether the preset's rules allow an equation to be recomputed.

        An equation whose outputs a rule names is recomputed only from exact operands
        and lossy operands that the same rule names: otherwise an error made in another
        place would reach the outputs.

        Args:
          node: the equation.
          lossy: the operands of the equation that may have an error.
        """
        rules = {id(self.ruled[v]) for v in node.outputs if v in self.ruled}
        return not rules or all(
            v in self.ruled and rules == {id(self.ruled[v])} for v in lossy
        )


def find(preset: Preset, program: Program, scope: str) -> RulePresets:
    """Applies the rules of a preset to a program; the first that matches holds.

    Args:
      preset: the preset.
      program: the program.
      scope: the path of the scopes around the program.
    """
    if not preset.rules:
        return RulePresets(preset, {}, frozenset(), frozenset())
    ruled: dict[int, Preset] = {}
    matched: set[str] = set()
    known: set[str] = set()
    for node in program.nodes:
        for place in _places(node, scope):
            known.add(place)
            matched.update(pattern for pattern, _ in _matching(preset, place))
    for pattern, treatment in preset.rules:
        for node in program.nodes:
            if any(matches(pattern, place) for place in _places(node, scope)):
                for value in (*node.outputs, *node.operands):
                    ruled.setdefault(value, treatment)
    return RulePresets(preset, ruled, frozenset(matched), frozenset(known))


def _matching(preset: Preset, place: str) -> Iterator[tuple[str, Preset]]:
    return (rule for rule in preset.rules if matches(rule[0], place))


@functools.lru_cache(maxsize=2**16)
def matches(pattern: str, place: str) -> bool:
    """Returns whether a pattern names a place or a scope around it.

    "encoder/*" matches the place "model/encoder/layer_0/mlp".
    """
    return fnmatch.fnmatchcase(f"/{place}/", f"*/{pattern.strip('/')}/*")


def _places(node: Node, around: str) -> Iterator[str]:
    """Yields the scope of an equation, and the name that a `checkpoint_name` gives."""
    scope = _scope(f"{around}/{node.equation.source_info.name_stack}")
    if scope:
        yield scope
    if node.name == compat.NAME and not classify.names_residual(node):
        yield node.params["name"]


_scope = functools.lru_cache(maxsize=2**16)(scopes.scope_path)
