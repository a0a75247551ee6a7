"""Finds values in which the small error of a few bits becomes a large one later."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dropit_jax.transform.tracing import primitives
from dropit_jax.transform.tracing.program import Node, Program, Scalar

# Numbers this large come from masks (such as -1e9 added to scores) alone.
_MASK = 1e4


def values(forward: Program, free: set[int], perturbed: Sequence[bool]) -> set[int]:
    """Returns the values that every preset stores exactly.

    Args:
      forward: the forward pass.
      free: the values of the forward pass that are never stored.
      perturbed: for each input, whether it is differentiated.
    """
    return (
        _masked(forward, free, perturbed)
        | _read_steeply(forward)
        | _decomposed(forward)
    )


def _masked(forward: Program, free: set[int], perturbed: Sequence[bool]) -> set[int]:
    """Returns the values that may contain a mask's large numbers.

    Beside such a number, all other elements of a group get the same code. The values
    are made with a constant of that size; or by adding an array that is not
    differentiated, as a mask among the arguments; or a softmax is taken of them.
    Exactness costs little: the values that they are computed from can be stored in few
    bits instead.
    """
    masked = {v for v, array in forward.constants.items() if _is_mask(array)}
    added: set[int] = set()
    maxima, constant = _maxima(forward), _unperturbed(forward, perturbed)
    for node in forward.nodes:
        operands = set(node.operands)
        if node.name == "sub" and len(operands) == 2 and node.inputs[1] in maxima:
            # A softmax: x - max(x).
            masked.update((*node.operands, *node.outputs))
            continue
        puts_in = primitives.ADDITIONS | primitives.MOVES | {"select_n"}
        if free >= operands or constant >= operands:
            # The mask itself is made, as by (1 - mask) * -1e9.
            puts_in |= {"mul"}
        constants = (atom.val for atom in node.inputs if isinstance(atom, Scalar))
        if (node.name in puts_in and any(map(_is_mask, constants))) or (
            node.name in primitives.PASS_MASKS | {"select_n"} and masked & operands
        ):
            masked.update(node.outputs)
        if (
            node.name in primitives.ADDITIONS
            and constant & operands
            and not constant >= operands
        ):
            added.update(node.outputs)
    return masked | added


def _maxima(forward: Program) -> set[int]:
    """Returns maxima along an axis, and moves, `max` and `select_n` of such maxima."""
    found: set[int] = set()
    for node in forward.nodes:
        if node.name == "reduce_max" or (
            node.name in primitives.MOVES | {"max", "select_n"}
            and not found.isdisjoint(node.operands)
        ):
            found.update(node.outputs)
    return found


def _unperturbed(forward: Program, perturbed: Sequence[bool]) -> set[int]:
    """Returns the arrays, scalars excluded, that depend on no differentiated input."""
    dependent = {v for v, yes in zip(forward.inputs, perturbed, strict=True) if yes}
    for node in forward.nodes:
        if not dependent.isdisjoint(node.operands):
            dependent.update(node.outputs)
    return {
        value
        for value, aval in enumerate(forward.avals)
        if value not in dependent and hasattr(aval, "shape") and aval.shape
    }


def _is_mask(constant: Any) -> bool:
    """Returns whether a constant contains numbers that only masks have."""
    if isinstance(constant, jax.core.Tracer) or not np.size(constant):
        return False
    if not jnp.issubdtype(jnp.result_type(constant), jnp.floating):
        return False
    return bool(np.max(np.abs(np.asarray(constant, np.float64))) >= _MASK)


def _read_steeply(forward: Program) -> set[int]:
    """Returns the operands of steep functions, and values that determine the operands.

    The error of a code is small relative to the largest element of its group, but large
    relative to the small ones, where a logarithm or a quotient is steepest. The search
    for the values goes through `_ONWARD_TO_STEEP`. It stops at an `exp`: the error of
    its result is relative to each element. The results of quotients have the widest
    range of all: they are returned too, unless the divisor is a broadcast.
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
    """Returns the operand in which an equation is steep; `None` if there is none."""
    if node.name not in primitives.STEEP | primitives.QUOTIENTS:
        return None
    if node.name == "integer_pow" and node.params["y"] > 0:
        return None
    operand = node.inputs[1 if node.name == "div" else 0]
    return operand if isinstance(operand, int) else None


_ONWARD_TO_STEEP = primitives.PASS_MASKS | {"integer_pow", "select_n", "square"}


# Applied to factors of a matrix, they return factors, or parts of these.
_OF_FACTORS = primitives.MOVES | {"convert_element_type", "mul", "select_n"}


def _decomposed(forward: Program) -> set[int]:
    """Returns matrices that are factored or solved with, and their factors.

    The derivative of a solution multiplies an error by the condition number.
    """
    matrices: set[int] = set()
    factors: set[int] = set()
    for node in forward.nodes:
        if node.name in primitives.DECOMPOSITIONS:
            matrices.update(node.operands)
            factors.update(node.outputs)
        elif node.name in _OF_FACTORS and not factors.isdisjoint(node.operands):
            factors.update(node.outputs)
    return matrices | factors
