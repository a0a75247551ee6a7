"""Sorts forward values by the harm that an error in them does to the gradients."""

import dataclasses
import enum
from collections.abc import Sequence, Set
from typing import Any

import jax.numpy as jnp

from dropit_jax import compat
from dropit_jax.transform.planning import fragile
from dropit_jax.transform.tracing import primitives, split
from dropit_jax.transform.tracing import program as programs
from dropit_jax.transform.tracing.program import Node, Program, Scalar


class Kind(enum.Enum):
    """A class of values.

    Attributes:
      FREE: inputs, which are alive anyway, and what costs next to nothing to compute of
        them alone.
      DISCRETE: of no floating point.
      KERNEL: only gradients of inputs depend on it, each by one product.
      FLOWING: the gradient of what came before depends on it.
      SMALL: too small to matter.
      KEPT: stored exactly: what a plan or a rule of its own has chosen to store,
        parameters that devices gathered, and values that few bits cannot hold
        (`fragile`).
    """

    FREE = "free"
    DISCRETE = "discrete"
    KERNEL = "kernel"
    FLOWING = "flowing"
    SMALL = "small"
    KEPT = "kept"


# What plans and rules of this library store, they name.
STORED_NAME = "dropit"

# A value this much smaller than a typical one is small; values of at least the typical
# size hold this share of all bytes. (The largest is not typical: the logits of a
# language model are a hundred times as large as its activations.)
_SMALL = 1 / 32
_SHARE = 0.9

# Moves, and casts: of an input they cost next to nothing.
_CHEAP = primitives.MOVES | {"convert_element_type", "mul", "neg"}

_SMOOTH = primitives.CONTINUOUS | primitives.MOVES


def names_what_is_stored(node: Node) -> bool:
    """Whether an equation names what another plan, or a DropIT rule, stores."""
    return node.name == compat.NAME and node.params["name"] == STORED_NAME


@dataclasses.dataclass(frozen=True)
class Classes:
    """The class of every forward value.

    Attributes:
      kinds: by value.
      parameters: values that are, or are made of, one input alone.
      needed: what the backward pass reads that is not free.
    """

    kinds: list[Kind]
    parameters: frozenset[int]
    needed: frozenset[int]


def classify(
    halves: split.Halves,
    backward: Program,
    free_inputs: Sequence[bool],
    final: Sequence[bool],
) -> Classes:
    """Sorts the values of the forward pass.

    Args:
      halves: of the function.
      backward: its backward pass.
      free_inputs: of each input, whether it is alive anyway.
      final: of each gradient, whether nothing is computed from it.
    """
    forward = halves.forward
    free, parameters = _inputs_alone(forward, free_inputs)
    reads = _reads(halves, backward, final)
    needed = frozenset(value for value in reads if value not in free)
    flowing = _flowing(forward, reads, free, parameters)
    kept = fragile.values(forward, free, halves.perturbed)
    kept |= {value for value, how in reads.items() if how == "kept"}
    for node in forward.nodes:
        is_gathered = node.name == "reshard" and free.issuperset(node.operands)
        if is_gathered or names_what_is_stored(node):
            kept.update(node.outputs)
    typical = _typical_size([programs.nbytes(forward.avals[v]) for v in needed])

    def kind(value: int, aval: Any) -> Kind:
        if value in free:
            return Kind.FREE
        if programs.nbytes(aval) <= typical * _SMALL:
            return Kind.SMALL
        if not split.is_floating(aval) or jnp.issubdtype(
            aval.dtype, jnp.complexfloating
        ):
            return Kind.DISCRETE
        if value in kept:
            return Kind.KEPT
        return Kind.FLOWING if value in flowing else Kind.KERNEL

    kinds = [kind(value, aval) for value, aval in enumerate(forward.avals)]
    return Classes(kinds, frozenset(parameters), needed)


def _typical_size(sizes: Sequence[int]) -> int:
    """The size such that values of at least that size hold most of the bytes."""
    total, held = sum(sizes), 0
    for size in sorted(sizes, reverse=True):
        held += size
        if held >= _SHARE * total:
            return size
    return 0


def _inputs_alone(
    forward: Program, free_inputs: Sequence[bool]
) -> tuple[set[int], set[int]]:
    """Values that are free, and those that are made of one input."""
    free = {v for v, yes in zip(forward.inputs, free_inputs, strict=True) if yes}
    free |= set(forward.constants)
    parameters = set(free)
    for node in forward.nodes:
        if node.equation.effects:
            continue
        if node.name not in primitives.PRODUCTS and parameters.issuperset(
            node.operands
        ):
            parameters.update(node.outputs)
        is_constant = not {*node.operands} and node.name in _SMOOTH
        if is_constant or (node.name in _CHEAP and free.issuperset(node.operands)):
            free.update(node.outputs)
    return free, parameters


def _reads(
    halves: split.Halves, backward: Program, final: Sequence[bool]
) -> dict[int, str]:
    """How the backward pass reads forward values: "kernel", "flowing" or "kept"."""
    inputs = backward.inputs[: len(halves.residuals)]
    how = _roles(backward, set(halves.cotangents), final)
    found: dict[int, str] = {}
    for value, atom in zip(inputs, halves.residuals, strict=True):
        if value in how and isinstance(atom, int):
            found[atom] = _stronger(how[value], found.get(atom, "kernel"))
    return found


# What a gradient goes through on its way from a product to the result.
_ONWARD = primitives.MOVES | {
    "add_any",
    "convert_element_type",
    "neg",
    "reduce_sum",
    "reshard",
    "sharding_constraint",
}
# The weaker role first.
_ROLES = ("kernel", "flowing", "kept")


def final_values(backward: Program, final: Sequence[bool]) -> set[int]:
    """The gradients that nothing is computed from, and what only becomes one of them.

    Args:
      backward: the backward pass.
      final: of each gradient, whether nothing is computed from it.
    """
    pairs = [*zip(backward.outputs, final, strict=True)]
    outputs = set(programs.values(backward.outputs))
    found = {v for v, yes in pairs if yes and isinstance(v, int)}
    found -= {v for v, yes in pairs if not yes and isinstance(v, int)}
    readers: dict[int, list[Node]] = {}
    for node in reversed(backward.nodes):
        for value in node.outputs:
            if value in outputs or value not in readers:
                continue
            if all(
                reader.name in _ONWARD and found.issuperset(reader.outputs)
                for reader in readers[value]
            ):
                found.add(value)
        for value in set(node.operands):
            readers.setdefault(value, []).append(node)
    return found


def _roles(
    backward: Program, linear: set[int], final: Sequence[bool]
) -> dict[int, str]:
    """How each value of the backward pass that depends on no cotangent is read."""
    for node in backward.nodes:
        if not linear.isdisjoint(node.operands):
            linear.update(node.outputs)
    last = final_values(backward, final)
    roles = dict.fromkeys(set(programs.values(backward.outputs)) - linear, "kept")
    for node in reversed(backward.nodes):
        role = _role(node, linear, last, roles)
        for value in node.operands:
            if value not in linear:
                roles[value] = _stronger(role, roles.get(value, "kernel"))
    return roles


def _role(node: Node, linear: set[int], last: set[int], roles: dict[int, str]) -> str:
    """How an equation of the backward pass reads values that are not linear."""
    if node.name in primitives.BODIES:
        return "kept"
    if not linear.isdisjoint(node.operands):
        is_final = node.name in primitives.PRODUCTS and last.issuperset(node.outputs)
        return "kernel" if is_final else "flowing"
    role = "kernel"
    for value in node.outputs:
        role = _stronger(role, roles.get(value, "kernel"))
    moves = node.name in primitives.MOVES | {"convert_element_type"}
    return role if moves else _stronger(role, "flowing")


def _stronger(*roles: str) -> str:
    return max(roles, key=_ROLES.index)


def _flowing(
    forward: Program, reads: dict[int, str], free: set[int], parameters: set[int]
) -> set[int]:
    """Values that the gradient flowing on reads, or is computed again of."""
    flowing = {value for value, how in reads.items() if how != "kernel"}
    for node in reversed(forward.nodes):
        if flowing.isdisjoint(node.outputs) or not is_repeatable(node, parameters):
            continue
        flowing.update(v for v in node.operands if v not in free)
    return flowing


def is_repeatable(node: Node, parameters: Set[int]) -> bool:
    """Whether an equation may be computed again at all.

    Products with a parameter are not, nor what has effects or draws random numbers, nor
    primitives that are not known.

    Args:
      node: the equation.
      parameters: values that are made of one input alone.
    """
    if node.equation.effects or names_what_is_stored(node):
        return False
    if node.name == "dot_general":
        return not any(
            isinstance(atom, Scalar) or atom in parameters for atom in node.inputs
        )
    return node.name in _REPEATABLE


_REPEATABLE = (
    primitives.CONTINUOUS | primitives.MOVES | primitives.REDUCTIONS | primitives.STEPS
)
