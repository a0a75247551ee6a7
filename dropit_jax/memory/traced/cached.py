"""Counts the bytes that the DropIT operations of a function store."""

import math
from collections.abc import Callable
from typing import Any

import jax

from dropit_jax import compat
from dropit_jax.compat import Jaxpr, Var, jaxprs_in_params, open_jaxpr
from dropit_jax.products.operand import RESIDUAL_NAME


def cached_bytes(fn: Callable[..., Any], *abstract_args: Any) -> int:
    """Returns the bytes that the DropIT operations in `fn` store for the backward pass.

    A residual in a loop counts once per step; the residuals of all branches of a
    conditional count, although JAX stores residuals of equal shapes and dtypes only
    once. In `jax.shard_map` the bytes are those of one device. Only traces `fn`:
    nothing is executed or allocated.

    Args:
      fn: a function that differentiates, such as a training step.
      *abstract_args: the arguments of `fn`, as arrays or `jax.ShapeDtypeStruct`s.
    """
    jaxpr = open_jaxpr(jax.make_jaxpr(fn)(*abstract_args))
    return _named_bytes(jaxpr, RESIDUAL_NAME)[0]


def _named_bytes(jaxpr: Jaxpr, name: str) -> tuple[int, list[bool]]:
    """Returns the bytes of the arrays of a name, and which inputs are read.

    Equations whose results nothing reads do not count.
    """
    total, read = 0, {v for v in jaxpr.outvars if isinstance(v, Var)}
    for equation in reversed(jaxpr.eqns):
        if not (equation.effects or read.intersection(equation.outvars)):
            continue
        inputs = [True] * len(equation.invars)
        if equation.primitive.name == compat.NAME and equation.params["name"] == name:
            avals: list[Any] = [variable.aval for variable in equation.outvars]
            total += sum(math.prod(a.shape) * a.dtype.itemsize for a in avals)
        repeats = equation.params.get("length", 1)  # the steps of a scan
        for inner in jaxprs_in_params(equation.params):
            nbytes, inputs_read = _named_bytes(inner, name)
            total += repeats * nbytes
            if equation.primitive.name == compat.CUSTOM_VJP:
                # The call is not differentiated, so its forward rule does not run, and
                # an operand that only the forward rule reads is not read.
                inputs = inputs_read
        read |= {
            variable
            for variable, is_read in zip(equation.invars, inputs, strict=True)
            if is_read and isinstance(variable, Var)
        }
    return total, [variable in read for variable in jaxpr.invars]
