"""Classifies forward values by the gradients that an error in them changes."""

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
    """The class of a forward value.

    Attributes:
      FREE: inputs that stay in memory anyway, constants, and values computed from
        these alone at next to no cost, such as casts. Never stored.
      DISCRETE: boolean, integer and complex values. Stored exactly.
      KERNEL: values that the backward pass reads only in products whose results are
        final gradients: an error changes these gradients alone.
      FLOWING: values on which the gradient of earlier operations depends.
      SMALL: values of any dtype too small for their bytes to matter. Stored exactly.
      KEPT: real floating-point values stored exactly: residuals of another plan or of a
        DropIT layer, parameters gathered from devices, `fragile` values, and values
        that a loop or the like reads in the backward pass.
    """

    FREE = "free"
    DISCRETE = "discrete"
    KERNEL = "kernel"
    FLOWING = "flowing"
    SMALL = "small"
    KEPT = "kept"


# The `checkpoint_name` of all residuals that plans and DropIT layers store.
STORED_NAME = "dropit"

# A value is small if its bytes are at most _SMALL of the typical size. Values of at
# least the typical size hold _SHARE of all bytes. (The largest value is not typical:
# the logits of a language model are a hundred times as large as its activations.)
_SMALL = 1 / 32
_SHARE = 0.9

# Applied to an input, they cost next to nothing.
_CHEAP = primitives.MOVES | {"convert_element_type", "mul", "neg"}

_SMOOTH = primitives.CONTINUOUS | primitives.MOVES


def names_residual(node: Node) -> bool:
    """Returns whether an equation names a residual of a plan or a DropIT layer."""
    return node.name == compat.NAME and node.params["name"] == STORED_NAME


@dataclasses.dataclass(frozen=True)
class Classes:
    """The classes of all forward values.

    Attributes:
      kinds: the class of each value, by its number.
      parameters: values computed from free inputs and constants alone, without a
        product: parameters of the model, the batch, and casts or sums of them.
      needed: the values that the backward pass reads and that are not free.
    """

    kinds: list[Kind]
    parameters: frozenset[int]
    needed: frozenset[int]


def classify(
    halves: split.Split,
    backward: Program,
    free_inputs: Sequence[bool],
    final: Sequence[bool],
) -> Classes:
    """Classifies the values of the forward pass.

    Args:
      halves: the passes of the function.
      backward: the backward pass to classify for.
      free_inputs: for each input, whether it stays in memory anyway.
      final: for each gradient, whether no other gradient is computed from it.
    """
    forward = halves.forward
    free, parameters = _free_and_parameters(forward, free_inputs)
    reads = _reads(halves, backward, final)
    needed = frozenset(value for value in reads if value not in free)
    flowing = _flowing(forward, reads, free, parameters)
    kept = fragile.values(forward, free, halves.perturbed)
    kept |= {value for value, how in reads.items() if how == "kept"}
    for node in forward.nodes:
        is_gathered = node.name == "reshard" and free.issuperset(node.operands)
        if is_gathered or names_residual(node):
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
    """Returns the largest size s such that values of s bytes or more hold `_SHARE`.

    `_SHARE` is of the bytes of all values. Without values, s is 0.
    """
    total, held = sum(sizes), 0
    for size in sorted(sizes, reverse=True):
        held += size
        if held >= _SHARE * total:
            return size
    return 0


def _free_and_parameters(
    forward: Program, free_inputs: Sequence[bool]
) -> tuple[set[int], set[int]]:
    """Returns the free values, and `Classes.parameters`."""
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
    halves: split.Split, backward: Program, final: Sequence[bool]
) -> dict[int, str]:
    """Returns the role, one of `_ROLES`, of each forward value that is a residual."""
    inputs = backward.inputs[: len(halves.residuals)]
    how = _roles(backward, set(halves.cotangents), final)
    found: dict[int, str] = {}
    for value, atom in zip(inputs, halves.residuals, strict=True):
        if value in how and isinstance(atom, int):
            found[atom] = _stronger(how[value], found.get(atom, "kernel"))
    return found


# Primitives between the product that makes a gradient and the backward pass's output.
_ONWARD = primitives.MOVES | {
    "add_any",
    "convert_element_type",
    "neg",
    "reduce_sum",
    "reshard",
    "sharding_constraint",
}
# How the backward pass reads a value; the role that allows more error comes first.
_ROLES = ("kernel", "flowing", "kept")


def final_values(backward: Program, final: Sequence[bool]) -> set[int]:
    """Returns the final gradients, and the values that are used for these alone.

    Only equations of `_ONWARD`, such as sums and casts, lie between such a value and
    the gradient. A gradient that is not final is never among the values.

    Args:
      backward: the backward pass.
      final: for each gradient, whether no other gradient is computed from it.
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
    """Returns the role of each backward value that depends on no cotangent.

    Args:
      backward: the backward pass.
      linear: the cotangents; updated with the values that depend on cotangents.
      final: as in `final_values`.
    """
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
    """Returns the role that an equation gives to its operands without cotangents.

    - "kept": the equation contains a program, as a loop does.
    - "kernel": the equation is a product with a cotangent, and its result is only used
      for a final gradient.
    - "flowing": the equation reads a cotangent in any other way.
    - The strongest role of its outputs: the equation reads no cotangent, and only moves
      or casts elements. If it computes something, the role is at least "flowing".

    Args:
      node: an equation of the backward pass.
      linear: the values that depend on the cotangents.
      last: the values that `final_values` returns.
      roles: the roles of the equation's outputs, "kernel" where one is missing.
    """
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
    """Returns the values that the flowing gradient reads, and their repeatable origins.

    The backward pass may recompute the values that are read from these origins.
    """
    flowing = {value for value, how in reads.items() if how != "kernel"}
    for node in reversed(forward.nodes):
        if flowing.isdisjoint(node.outputs) or not is_repeatable(node, parameters):
            continue
        flowing.update(v for v in node.operands if v not in free)
    return flowing


def is_repeatable(node: Node, parameters: Set[int]) -> bool:
    """Returns whether the backward pass may recompute an equation.

    It may not recompute products with a parameter, convolutions, equations with side
    effects or random bits, and primitives that `primitives` does not list.

    Args:
      node: the equation.
      parameters: as in `Classes`.
    """
    if node.equation.effects or names_residual(node):
        return False
    if node.name == "dot_general":
        return not any(
            isinstance(atom, Scalar) or atom in parameters for atom in node.inputs
        )
    return node.name in _REPEATABLE


_REPEATABLE = (
    primitives.CONTINUOUS
    | primitives.MOVES
    | primitives.REDUCTIONS
    | primitives.DISCONTINUOUS
)
