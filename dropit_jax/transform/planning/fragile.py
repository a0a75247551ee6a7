"""Values that few bits cannot hold: a small error in them is a large one later."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dropit_jax.transform.tracing import primitives
from dropit_jax.transform.tracing.program import Node, Program, Scalar

# A number that only a mask puts into an array.
_MASK = 1e4


def values(forward: Program, free: set[int], perturbed: Sequence[bool]) -> set[int]:
    """The values that are stored exactly, whatever the preset.

    Args:
      forward: the forward pass.
      free: its values that are never stored.
      perturbed: of each input, whether it is differentiated.
    """
    return (
        _masked(forward, free, perturbed)
        | _read_steeply(forward)
        | _decomposed(forward)
    )


def _masked(forward: Program, free: set[int], perturbed: Sequence[bool]) -> set[int]:
    """Values that may have a mask's numbers in them, beside which others are nothing.

    They are made with a constant of that size, or by adding an array that is not
    differentiated, as a mask that is an argument is; or a softmax is taken of them.
    Values that they are computed from take as few bytes.
    """
    masked = {v for v, array in forward.constants.items() if _is_mask(array)}
    added: set[int] = set()
    shifts, still = _of_a_maximum(forward), _still(forward, perturbed)
    for node in forward.nodes:
        operands = set(node.operands)
        if node.name == "sub" and len(operands) == 2 and node.inputs[1] in shifts:
            masked.update((*node.operands, *node.outputs))
            continue
        puts_in = primitives.SUMS | primitives.MOVES | {"select_n"}
        if free >= operands or still >= operands:
            puts_in |= {"mul"}
        constants = (atom.val for atom in node.inputs if isinstance(atom, Scalar))
        if (node.name in puts_in and any(map(_is_mask, constants))) or (
            node.name in primitives.LINEAR | {"select_n"} and masked & operands
        ):
            masked.update(node.outputs)
        if node.name in primitives.SUMS and still & operands and not still >= operands:
            added.update(node.outputs)
    return masked | added


def _of_a_maximum(forward: Program) -> set[int]:
    """Maxima along an axis, and what is only moved of them."""
    found: set[int] = set()
    for node in forward.nodes:
        if node.name == "reduce_max" or (
            node.name in primitives.MOVES | {"max", "select_n"}
            and not found.isdisjoint(node.operands)
        ):
            found.update(node.outputs)
    return found


def _still(forward: Program, perturbed: Sequence[bool]) -> set[int]:
    """Arrays that depend on nothing that is differentiated."""
    moving = {v for v, yes in zip(forward.inputs, perturbed, strict=True) if yes}
    for node in forward.nodes:
        if not moving.isdisjoint(node.operands):
            moving.update(node.outputs)
    return {
        value
        for value, aval in enumerate(forward.avals)
        if value not in moving and hasattr(aval, "shape") and aval.shape
    }


def _is_mask(constant: Any) -> bool:
    """Whether numbers are so large that only a mask puts them into an array."""
    if isinstance(constant, jax.core.Tracer) or not np.size(constant):
        return False
    if not jnp.issubdtype(jnp.result_type(constant), jnp.floating):
        return False
    return bool(np.max(np.abs(np.asarray(constant, np.float64))) >= _MASK)


def _read_steeply(forward: Program) -> set[int]:
    """Values of which a steep function is taken, and those that they are computed of.

    An error that is small beside a group of 64 is large beside its small elements,
    where a logarithm or a quotient is steepest. After an `exp` it is not: there the
    error of the result is relative to it. What a quotient gives has the largest range
    of all, unless all elements of a row have one divisor.
    """
    makers = forward.makers()
    steep: set[int] = set()
    for node in reversed(forward.nodes):
        read = _steep_operand(node)
        if read is not None and forward.avals[read].shape:
            steep.add(read)
            maker = makers.get(read)
            if node.name in primitives.QUOTIENTS and not (
                maker and maker.name == "broadcast_in_dim"
            ):
                steep.update(node.outputs)
        if node.name in _ONWARD_TO_STEEP and not steep.isdisjoint(node.outputs):
            steep.update(node.operands)
    return steep


def _steep_operand(node: Node) -> int | None:
    """The value of which an equation is a steep function."""
    if node.name not in primitives.STEEP | primitives.QUOTIENTS:
        return None
    if node.name == "integer_pow" and node.params["y"] > 0:
        return None
    operand = node.inputs[1 if node.name == "div" else 0]
    return operand if isinstance(operand, int) else None


_ONWARD_TO_STEEP = primitives.LINEAR | {"integer_pow", "select_n", "square"}


# What leaves the factors of a matrix as they are, or some of them.
_PARTS = primitives.MOVES | {"convert_element_type", "mul", "select_n"}


def _decomposed(forward: Program) -> set[int]:
    """Matrices that are solved with or taken apart, their factors, parts of these.

    The derivative of a solution multiplies an error by the condition of the matrix.
    """
    matrices: set[int] = set()
    factors: set[int] = set()
    for node in forward.nodes:
        if node.name in primitives.DECOMPOSITIONS:
            matrices.update(node.operands)
            factors.update(node.outputs)
        elif node.name in _PARTS and not factors.isdisjoint(node.operands):
            factors.update(node.outputs)
    return matrices | factors
