"""What it costs to store a value, and what to compute it again: both in bytes."""

import math
from typing import Any

import numpy as np

from dropit_jax.transform import primitives, split
from dropit_jax.transform import program as programs
from dropit_jax.transform.classify import Classes, Kind, names_what_is_stored
from dropit_jax.transform.presets import Preset
from dropit_jax.transform.program import Node, Program, Scalar
from dropit_jax.transform.storage import Bits, Exact, Form

# Operations of a product for which a GPU could move a byte. (H100, bfloat16: 1e15
# operations and 3.4e12 bytes a second.) The price of the time is what the memory for
# that byte is worth.
_FLOPS_A_BYTE = 250.0

NEVER = math.inf

# Computed again by every preset.
_SMOOTH = primitives.CONTINUOUS | primitives.MOVES | primitives.REDUCTIONS


def form(preset: Preset, kind: Kind, aval: Any) -> Form:
    """How a value of a class is stored."""
    if not getattr(aval, "shape", ()):
        return Exact()
    if kind is Kind.DISCRETE and aval.dtype == np.bool_:
        chosen: Form = Bits()
    elif kind is Kind.KERNEL:
        chosen = preset.kernel
    elif kind is Kind.FLOWING:
        chosen = preset.flowing
    else:
        return Exact()
    return chosen if chosen.nbytes(aval) < programs.nbytes(aval) else Exact()


def storing(preset: Preset, kind: Kind, aval: Any) -> float:
    """The bytes that a stored value takes."""
    if not hasattr(aval, "shape"):
        return 0.0
    if not programs.nbytes(aval):
        return float(math.prod(aval.shape) * 8)  # such as keys
    return float(form(preset, kind, aval).nbytes(aval))


def rebuilding(preset: Preset, classes: Classes, program: Program, node: Node) -> float:
    """The price of an equation's second computation."""
    if node.equation.effects or names_what_is_stored(node):
        return NEVER
    if node.name in primitives.PRODUCTS:
        return _product(preset, classes, program, node)
    allowed = node.name in _SMOOTH or node.name in primitives.STEPS
    if not allowed:
        return NEVER
    inexact = [v for v in node.operands if _may_be_lossy(preset, classes, program, v)]
    makes_steps = node.name in primitives.STEPS or not all(
        split.is_floating(program.avals[v]) for v in node.outputs
    )
    if makes_steps and inexact:
        return NEVER
    return preset.traffic * _moved(program, node)


def _may_be_lossy(
    preset: Preset, classes: Classes, program: Program, value: int
) -> bool:
    """Whether a value may be computed of others that are stored with an error."""
    return (
        preset.is_lossy
        and classes.kinds[value] is not Kind.FREE
        and split.is_floating(program.avals[value])
    )


def _product(preset: Preset, classes: Classes, program: Program, node: Node) -> float:
    if node.name != "dot_general" or any(
        isinstance(atom, Scalar) or atom in classes.parameters for atom in node.inputs
    ):
        return NEVER
    (contracted, _), _ = node.params["dimension_numbers"]
    shape = program.avals[next(node.operands)].shape
    (output,) = node.outputs
    flops = 2 * math.prod(program.avals[output].shape)
    flops *= math.prod(shape[axis] for axis in contracted)
    return flops / _FLOPS_A_BYTE + preset.traffic * _moved(program, node)


def _moved(program: Program, node: Node) -> float:
    """The bytes that an equation reads and makes."""
    values = (*set(node.operands), *node.outputs)
    return float(sum(programs.nbytes(program.avals[value]) for value in values))
