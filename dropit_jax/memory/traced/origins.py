"""Finds the equation that computes an array of a traced function."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from dropit_jax import compat
from dropit_jax.compat import Jaxpr, JaxprEqn, Var, jaxprs_in_params

# The values of `Origin.primitive` for arrays that no equation computes.
ARGUMENT, CONSTANT = "argument", "constant"

# Primitives that return their operand unchanged if size and dtype stay the same.
_COPIES = compat.COPIES | {"join_sharding_group", "optimization_barrier_by_platform"}


@dataclasses.dataclass(frozen=True)
class Origin:
    """The equation or argument that an array comes from.

    Attributes:
      key: identifies the array: two origins have the same key if and only if they are
        of the same array.
      aval: the shape and dtype of the array.
      primitive: the name of the primitive that computes the array; `ARGUMENT` for an
        argument, `CONSTANT` for an array that depends on no argument.
      path: the scopes around the equation, joined by "/".
      name: the array's name from `jax.ad_checkpoint.checkpoint_name`, or "".
    """

    key: tuple[int, ...]
    aval: Any
    primitive: str
    path: str
    name: str


@dataclasses.dataclass(frozen=True)
class _Frame:
    """A jaxpr, and the equation and frame that call it; the outermost has neither."""

    jaxpr: Jaxpr
    call: JaxprEqn | None = None
    caller: "_Frame | None" = None

    @functools.cached_property
    def makers(self) -> dict[Var, JaxprEqn]:
        """The equation that computes each variable."""
        return {var: eqn for eqn in self.jaxpr.eqns for var in eqn.outvars}

    @functools.cached_property
    def _inside(self) -> dict[int, "_Frame"]:
        return {}

    def inside(self, jaxpr: Jaxpr, call: JaxprEqn) -> "_Frame":
        """Returns the frame of a jaxpr that an equation of this frame calls."""
        return self._inside.setdefault(id(call), _Frame(jaxpr, call, self))

    @property
    def calls(self) -> tuple[JaxprEqn, ...]:
        """The equations that lead to this frame, the outermost first."""
        if self.call is None or self.caller is None:
            return ()
        return (*self.caller.calls, self.call)

    def origin(self, variable: Any, maker: JaxprEqn | str, name: str) -> Origin:
        """Returns the origin of a variable of this frame."""
        equations, primitive = self.calls, maker
        if not isinstance(maker, str):
            equations, primitive = (*equations, maker), maker.primitive.name
        return Origin(
            # Two calls of one jitted function share its variables.
            key=tuple(map(id, (*self.calls, variable))),
            aval=variable.aval,
            primitive=str(primitive),
            path="/".join(str(each.source_info.name_stack) for each in equations),
            name=name,
        )


def find_origins(variables: Iterable[Any], jaxpr: Jaxpr) -> list[Origin]:
    """Returns the origins of variables of a jaxpr.

    The search passes through primitives that return their operand unchanged (`_COPIES`)
    and into and out of called jaxprs.
    """
    frame = _Frame(jaxpr)
    return [_find(variable, frame, "") for variable in variables]


def _find(
    variable: Any, frame: _Frame, name: str, visited: tuple[Var, ...] = ()
) -> Origin:
    """Returns the origin of a variable or literal of a frame.

    `name` is the `checkpoint_name` met so far, or "". `visited` are the loop carries
    passed so far: the search ends where a loop hands a carry on unchanged.
    """
    if not isinstance(variable, Var) or variable in frame.jaxpr.constvars:
        return frame.origin(variable, CONSTANT, name)
    if variable not in frame.makers:
        return _find_input(variable, frame, name, visited)
    maker = frame.makers[variable]
    position = maker.outvars.index(variable)
    operand = _copied_operand(maker, position)
    if operand is not None:
        if maker.primitive.name == compat.NAME:
            name = name or maker.params["name"]
        return _find(operand, frame, name, visited)
    called = _called(maker)
    if called is not None:
        inside = frame.inside(called, maker)
        origin = _find(called.outvars[position], inside, name, visited)
        is_scan = maker.primitive.name == compat.SCAN
        is_carry = is_scan and position < compat.scan_counts(maker)[1]
        # The last carry is another array than the stack of results that it is in.
        return _of_carry(origin, variable) if is_carry else origin
    if not any(isinstance(operand, Var) for operand in maker.invars):
        return frame.origin(variable, CONSTANT, name)  # an iota, say
    return frame.origin(variable, maker, name)


def _called(maker: JaxprEqn) -> Jaxpr | None:
    """Returns the jaxpr that computes an equation's results one by one, or `None`."""
    if maker.primitive.name.startswith(("scatter", "reduce")):
        return None  # the jaxpr combines two elements
    inner = list(jaxprs_in_params(maker.params))
    is_called = len(inner) == 1 and len(inner[0].outvars) == len(maker.outvars)
    return inner[0] if is_called else None


def _find_input(
    variable: Var, frame: _Frame, name: str, visited: tuple[Var, ...]
) -> Origin:
    """Returns the origin of an input of a frame's jaxpr."""
    call, inputs = frame.call, frame.jaxpr.invars
    if call is None or frame.caller is None:
        return frame.origin(variable, ARGUMENT, name)
    index = inputs.index(variable)
    if call.primitive.name == compat.SCAN:
        num_constants, num_carries = compat.scan_counts(call)
        position = index - num_constants
        if position < 0 or variable in visited:
            # The same in each step: the residual is a stack of copies, by the scan.
            return frame.origin(variable, "scan", name)
        if position < num_carries:
            # The carry is the result of the previous step. The residual, a stack of
            # carries, is shifted by one step against the stack of results, so it is
            # another array and takes another key.
            result = frame.jaxpr.outvars[position]
            previous = _find(result, frame, name, (*visited, variable))
            return _of_carry(previous, variable)
    operand = call.invars[len(call.invars) - len(inputs) + index]
    return _find(operand, frame.caller, name, visited)


def _of_carry(computed: Origin, carry: Var) -> Origin:
    """Returns the origin of a loop's carry, given the origin of the computed value.

    A carry is new memory, even if it is an element of an argument.
    """
    is_new = computed.primitive not in (ARGUMENT, CONSTANT)
    primitive = computed.primitive if is_new else compat.SCAN
    key = (*computed.key, id(carry))
    return dataclasses.replace(computed, key=key, primitive=primitive)


def _copied_operand(maker: JaxprEqn, position: int) -> Any:
    """Returns the operand of which an equation's result is a copy; `None` if computed.

    Args:
      maker: the equation.
      position: the position of the result, and of the operand, in the equation.
    """
    if maker.primitive.name not in _COPIES:
        return None
    operand: Any = maker.invars[position]
    result: Any = maker.outvars[position]
    if maker.primitive.name == compat.REDUCE_PRECISION:
        # With the mantissa of the dtype, it is only a marker of `jax.checkpoint`.
        bits = jnp.finfo(result.aval.dtype).nmant
        return operand if maker.params["mantissa_bits"] == bits else None
    types = [(each.aval.size, each.aval.dtype) for each in (operand, result)]
    return operand if types[0] == types[1] else None
