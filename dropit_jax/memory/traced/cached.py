"""Bytes that the DropIT operations of a function cache."""

import math
from collections.abc import Callable
from typing import Any

import jax

from dropit_jax import compat
from dropit_jax.compat import Jaxpr, Var, jaxprs_in_params, open_jaxpr
from dropit_jax.products.operand import RESIDUAL_NAME


def cached_bytes(fn: Callable[..., Any], *abstract_args: Any) -> int:
    """Bytes that the DropIT operations in `fn` cache for their backward pass.

    Counts every residual in the traced function, in each step of a loop. Nothing runs
    and nothing is allocated.

    Args:
      fn: a function that differentiates, such as a training step.
      *abstract_args: its arguments, as arrays or `jax.ShapeDtypeStruct`s.
    """
    jaxpr = open_jaxpr(jax.make_jaxpr(fn)(*abstract_args))
    return _named_bytes(jaxpr, RESIDUAL_NAME)[0]


def _named_bytes(jaxpr: Jaxpr, name: str) -> tuple[int, list[bool]]:
    """Bytes of the named arrays that something reads, and which inputs are read."""
    total, read = 0, {v for v in jaxpr.outvars if isinstance(v, Var)}
    for equation in reversed(jaxpr.eqns):
        if not (equation.effects or read.intersection(equation.outvars)):
            continue
        inputs = [True] * len(equation.invars)
        if equation.primitive.name == compat.NAME and equation.params["name"] == name:
            avals: list[Any] = [variable.aval for variable in equation.outvars]
            total += sum(math.prod(a.shape) * a.dtype.itemsize for a in avals)
        repeats = equation.params.get("length", 1)  # of a scan's body
        for inner in jaxprs_in_params(equation.params):
            nbytes, inputs_read = _named_bytes(inner, name)
            total += repeats * nbytes
            if equation.primitive.name == compat.CUSTOM_VJP:
                # It is not differentiated: what only its forward rule reads is not.
                inputs = inputs_read
        read |= {
            variable
            for variable, is_read in zip(equation.invars, inputs, strict=True)
            if is_read and isinstance(variable, Var)
        }
    return total, [variable in read for variable in jaxpr.invars]
