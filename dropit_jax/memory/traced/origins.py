"""Finds the operation that makes an array of a traced function."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from dropit_jax import compat
from dropit_jax.compat import Jaxpr, JaxprEqn, Var, jaxprs_in_params

# What no operation makes.
ARGUMENT, CONSTANT = "argument", "constant"

# Operations that return an operand as it is, if size and dtype stay the same.
_COPIES = compat.COPIES | {"join_sharding_group", "optimization_barrier_by_platform"}


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where an array comes from.

    Attributes:
      key: equal for one array, different for two.
      aval: its type.
      primitive: what makes it: the name of a JAX primitive, `ARGUMENT`, or `CONSTANT`
        for what depends on nothing.
      path: the names of the scopes that it is made in.
      name: what `jax.ad_checkpoint.checkpoint_name` called it; "" if it did not.
    """

    key: tuple[int, ...]
    aval: Any
    primitive: str
    path: str
    name: str


@dataclasses.dataclass(frozen=True)
class _Frame:
    """A function, and where it is called: the equation and its function, if any."""

    jaxpr: Jaxpr
    call: JaxprEqn | None = None
    caller: "_Frame | None" = None

    @functools.cached_property
    def makers(self) -> dict[Var, JaxprEqn]:
        """The equation that makes each variable."""
        return {var: eqn for eqn in self.jaxpr.eqns for var in eqn.outvars}

    @functools.cached_property
    def _inside(self) -> dict[int, "_Frame"]:
        return {}

    def inside(self, jaxpr: Jaxpr, call: JaxprEqn) -> "_Frame":
        """A function that an equation of this one calls."""
        return self._inside.setdefault(id(call), _Frame(jaxpr, call, self))

    @property
    def calls(self) -> tuple[JaxprEqn, ...]:
        """The equations on the way here, the outermost first."""
        if self.call is None or self.caller is None:
            return ()
        return (*self.caller.calls, self.call)

    def origin(self, variable: Any, made_by: JaxprEqn | str, name: str) -> Origin:
        """An origin in this function."""
        equations, primitive = self.calls, made_by
        if not isinstance(made_by, str):
            equations, primitive = (*equations, made_by), made_by.primitive.name
        return Origin(
            key=tuple(map(id, (*self.calls, variable))),
            aval=variable.aval,
            primitive=str(primitive),
            path="/".join(str(each.source_info.name_stack) for each in equations),
            name=name,
        )


def find(variables: Iterable[Any], jaxpr: Jaxpr) -> list[Origin]:
    """The origins of variables of a function.

    They are looked for through operations that return their operand, and in the
    functions that the function calls.
    """
    frame = _Frame(jaxpr)
    return [_find(variable, frame, "") for variable in variables]


def _find(
    variable: Any, frame: _Frame, name: str, carried: tuple[Var, ...] = ()
) -> Origin:
    """The origin of a variable, given its name and the loops' inputs on the way."""
    if not isinstance(variable, Var) or variable in frame.jaxpr.constvars:
        return frame.origin(variable, CONSTANT, name)
    if variable not in frame.makers:
        return _find_outside(variable, frame, name, carried)
    maker = frame.makers[variable]
    position = maker.outvars.index(variable)
    operand = _copied(maker, position)
    if operand is not None:
        if maker.primitive.name == compat.NAME:
            name = name or maker.params["name"]
        return _find(operand, frame, name, carried)
    inner = list(jaxprs_in_params(maker.params))
    if len(inner) == 1 and len(inner[0].outvars) == len(maker.outvars):
        inside = frame.inside(inner[0], maker)
        return _find(inner[0].outvars[position], inside, name, carried)
    if not any(isinstance(operand, Var) for operand in maker.invars):
        return frame.origin(variable, CONSTANT, name)  # a fill, or an iota
    return frame.origin(variable, maker, name)


def _find_outside(
    variable: Var, frame: _Frame, name: str, carried: tuple[Var, ...]
) -> Origin:
    """The origin of an input of a function."""
    call, inputs = frame.call, frame.jaxpr.invars
    if call is None or frame.caller is None:
        return frame.origin(variable, ARGUMENT, name)
    index = inputs.index(variable)
    if call.primitive.name == compat.SCAN:
        constants, carries = compat.scan_counts(call)
        number = index - constants
        if number < 0 or variable in carried:  # the same in each step
            return frame.origin(variable, "scan", name)
        if number < carries:
            # What the step before returned: another array than what this one does.
            result = frame.jaxpr.outvars[number]
            before = _find(result, frame, name, (*carried, variable))
            return dataclasses.replace(before, key=(*before.key, id(variable)))
    operand = call.invars[len(call.invars) - len(inputs) + index]
    return _find(operand, frame.caller, name, carried)


def _copied(maker: JaxprEqn, position: int) -> Any:
    """The operand that a result is a copy of; `None` if of none."""
    if maker.primitive.name not in _COPIES:
        return None
    operand: Any = maker.invars[position]
    result: Any = maker.outvars[position]
    if maker.primitive.name == compat.REDUCE_PRECISION:
        bits = jnp.finfo(result.aval.dtype).nmant
        return operand if maker.params["mantissa_bits"] == bits else None
    types = [(each.aval.size, each.aval.dtype) for each in (operand, result)]
    return operand if types[0] == types[1] else None
