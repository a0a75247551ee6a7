"""Removes the equations of a backward pass whose cotangents are zero.

JAX's own equations of a backward pass are linear in the cotangents. The backward rule
of a user's `jax.custom_vjp` need not be, so a zero passes only through equations that
are known to make zeros of zeros. All others read arrays of zeros.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from dropit_jax import compat
from dropit_jax.compat import Jaxpr, JaxprEqn, Literal, jaxprs_in_params
from dropit_jax.transform.tracing import primitives
from dropit_jax.transform.tracing import program as programs
from dropit_jax.transform.tracing.program import Node, Program
from dropit_jax.transform.tracing.split import Split

# Where one operand is zero, the result is the other operand.
_SUMS = frozenset({"add", "add_any"})
# Run one jaxpr on their operands, beside the calls of `compat.called_program`.
_WITH_BODY = frozenset({"checkpoint", "remat2", "shard_map"})


def without_zeros(
    halves: Split, is_zero: Sequence[bool]
) -> tuple[Program, tuple[bool, ...]]:
    """Returns the backward pass simplified for cotangents that are known to be zero.

    Args:
      halves: the passes of the function.
      is_zero: for each cotangent, whether it is zero.

    Returns:
      The program that computes the gradients that are not zero, and for each gradient
      whether it is zero.
    """
    backward = halves.backward
    linear = set(halves.cotangents)
    zero = {v for v, yes in zip(halves.cotangents, is_zero, strict=True) if yes}
    literal: set[Any] = set()  # zeros that depend on no cotangent
    constants, nodes = dict(backward.constants), []
    same: dict[Any, Any] = {}
    for node in backward.nodes:
        inputs = tuple(same.get(atom, atom) for atom in node.inputs)
        of_cotangents = linear.intersection(programs.values(inputs))
        gone = _zero_results(
            node.equation, [_is_zero(atom, zero | literal) for atom in inputs]
        )
        if of_cotangents:
            linear.update(node.outputs)
        if gone and all(gone):  # effects alone have no result
            if of_cotangents:
                zero.update(node.outputs)
                continue
            literal.update(node.outputs)
        if node.name in primitives.BARRIERS:
            pairs = zip(node.outputs, inputs, gone, strict=True)
            same.update({result: atom for result, atom, yes in pairs if yes})
        if node.name in _SUMS and of_cotangents & zero:
            other = next(v for v in inputs if v not in zero)
            if other in of_cotangents and _has_type_of(backward, other, node):
                same[node.outputs[0]] = other
                continue
        for value in of_cotangents & zero:
            constants[value] = programs.Zeros(backward.avals[value])
        nodes.append(dataclasses.replace(node, inputs=inputs))
    outputs = [same.get(atom, atom) for atom in backward.outputs]
    dropped = tuple(atom in zero for atom in outputs)
    return programs.without_dead(
        dataclasses.replace(
            backward,
            constants=constants,
            nodes=tuple(nodes),
            outputs=tuple(o for o, z in zip(outputs, dropped, strict=True) if not z),
        )
    ), dropped


def _is_zero(atom: Any, zeros: set[Any]) -> bool:
    """Returns whether an atom of a program or jaxpr is a floating-point zero."""
    if isinstance(atom, programs.Scalar | Literal):
        is_floating = jnp.issubdtype(jnp.result_type(atom.val), jnp.inexact)
        return bool(is_floating and atom.val == 0)
    return atom in zeros


def _has_type_of(program: Program, value: int, node: Node) -> bool:
    shapes = (program.avals[each].shape for each in (value, node.outputs[0]))
    return len(set(map(tuple, shapes))) == 1


def _zero_results(equation: JaxprEqn, zero: Sequence[bool]) -> list[bool]:
    """Returns for each result of an equation whether it is zero for certain.

    Args:
      equation: the equation.
      zero: for each operand, whether it is a floating-point zero.
    """
    name, results = equation.primitive.name, len(equation.outvars)
    if not any(zero):
        return [False] * results
    if name in primitives.BARRIERS:
        return list(zero)
    if name == compat.SCAN:
        return _of_scan(equation, zero)
    inner = [*jaxprs_in_params(equation.params)]
    if name == "cond":
        branches = [_of_jaxpr(jaxpr, zero[1:]) for jaxpr in inner]
        return [all(each) for each in zip(*branches, strict=True)]
    if name in _WITH_BODY or compat.called_program(equation) is not None:
        return _of_jaxpr(inner[0], zero)
    return [_makes_zero(equation, zero)] * results


def _makes_zero(equation: JaxprEqn, zero: Sequence[bool]) -> bool:
    """Returns whether an operation makes zeros of operands, some of which are zero."""
    name = equation.primitive.name
    if name in primitives.JOINTLY_LINEAR:
        floats = map(_is_floating, equation.invars)
        return all(z for z, floating in zip(zero, floats, strict=True) if floating)
    if name in primitives.LINEAR_IN_FIRST:
        return zero[0]
    return name in primitives.MULTILINEAR


def _of_jaxpr(jaxpr: Jaxpr, zero: Sequence[bool]) -> list[bool]:
    """Returns for each output of a jaxpr whether it is zero for certain."""
    jaxpr = compat.open_jaxpr(jaxpr)
    zeros = {v for v, yes in zip(jaxpr.invars, zero, strict=True) if yes}
    for each in jaxpr.eqns:
        found = _zero_results(each, [_is_zero(atom, zeros) for atom in each.invars])
        zeros |= {v for v, yes in zip(each.outvars, found, strict=True) if yes}
    return [_is_zero(atom, zeros) for atom in jaxpr.outvars]


def _of_scan(equation: JaxprEqn, zero: Sequence[bool]) -> list[bool]:
    """Returns which results of a scan are zero: carries that are so in every step."""
    constants, carries = compat.scan_counts(equation)
    (body,) = jaxprs_in_params(equation.params)
    zero = [*zero]
    while True:
        results, before = _of_jaxpr(body, zero), [*zero]
        for i in range(carries):
            zero[constants + i] &= results[i]
        if zero == before:
            return results


def _is_floating(variable: Any) -> bool:
    return jnp.issubdtype(getattr(variable.aval, "dtype", jnp.int32), jnp.inexact)
