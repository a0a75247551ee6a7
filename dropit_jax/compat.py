"""Imports every private or experimental name of JAX and Flax that the library uses.

All other files of the library use public interfaces only.
`tests/dropit_jax/test_compat.py` checks this, and names each private name that a new
version removes. The comments say why a name is needed and which name may replace it.
"""

import contextlib
import functools
import importlib
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.export

# Tells XLA how to shard a kernel over the Auto axes of a mesh; `jax.shard_map` does so
# over Explicit and Manual axes.
from jax.experimental.custom_partitioning import custom_partitioning

# Sets the layout of an array in a GPU's memory, inside a traced function.
from jax.experimental.layout import Layout, with_layout_constraint

# Forbids XLA's CPU compiler to inline a call, which no public function does.
from jax.experimental.xla_metadata import set_xla_metadata

# `jax.extend` is JAX's module for extensions, without a promise of stability. It has:
# - traced programs: `memory` reads them and `platforms` makes them. `jaxprs_in_params`
#   returns open jaxprs, whichever kind a version of JAX stores in an equation;
# - primitives: `jax.lax.platform_dependent` instead leaves a branch in the program,
#   which XLA has to remove in every layer. `jax.experimental.hijax` may replace them.
from jax.extend import source_info_util
from jax.extend.core import (
    Jaxpr,
    JaxprEqn,
    Literal,
    Primitive,
    Var,
    jaxpr_as_fun,
    jaxprs_in_params,
)

# Shards a group of arrays alike; `jax.experimental.shard_alike` takes two arrays only.
from jax.extend.mlir.dialects import sdy

# Register the rules of this library's primitives.
from jax.interpreters import ad, batching, mlir

# Finds the residuals that a backward pass reads.
from jax.interpreters.partial_eval import dce_jaxpr

_T = TypeVar("_T")

__all__ = [
    "COPIES",
    "CUSTOM_VJP",
    "HOST_CALLS",
    "NAME",
    "REDUCE_PRECISION",
    "SCAN",
    "Jaxpr",
    "JaxprEqn",
    "Layout",
    "Literal",
    "Primitive",
    "Var",
    "ad",
    "batching",
    "bind_equation",
    "called_program",
    "concrete",
    "constants",
    "current_scope",
    "custom_partitioning",
    "dce_jaxpr",
    "flax_function",
    "flax_modules",
    "has_triton",
    "hush_triton",
    "in_scope",
    "is_export",
    "is_reference",
    "jaxpr_as_fun",
    "jaxprs_in_params",
    "mlir",
    "num_devices",
    "of_module",
    "open_jaxpr",
    "remat",
    "scan_counts",
    "sdy",
    "set_xla_metadata",
    "shard_map_arguments",
    "source_line",
    "under",
    "with_layout_constraint",
    "without_flax_wrapper",
]

# Attributes of this module that are imported on first use: the import is slow, or the
# module is missing in some version of JAX. `topologies` describes GPUs that need not be
# in this machine. `pallas` writes kernels; `triton` is its backend for GPUs, deprecated
# since JAX 0.12 (`has_triton`).
_LAZY = {
    "pallas": "jax.experimental.pallas",
    "topologies": "jax.experimental.topologies",
    "triton": "jax.experimental.pallas.triton",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(_LAZY[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# Names of primitives. `memory` follows an array through a traced program by them, since
# `jax.extend.core.primitives` lacks some of the primitives. A program that contains
# `CUSTOM_VJP` is not differentiated yet.
CUSTOM_VJP = "custom_vjp_call"
NAME = "name"  # `jax.ad_checkpoint.checkpoint_name`
REDUCE_PRECISION = "reduce_precision"  # `jax.checkpoint` puts it on residuals
SCAN = "scan"
# Primitives that call a Python function on the host. A program with one of them cannot
# be compiled for another machine.
HOST_CALLS = frozenset(
    {"debug_callback", "debug_print", "io_callback", "pure_callback"}
)
# Primitives that return their operand unchanged if size and dtype stay the same.
COPIES = frozenset(
    {
        NAME,
        REDUCE_PRECISION,
        "broadcast_in_dim",
        "convert_element_type",
        "copy",
        "optimization_barrier",
        "reshape",
        "sharding_constraint",
        "squeeze",
        "stop_gradient",
    }
)


def open_jaxpr(closed: Any) -> Jaxpr:
    """Returns the jaxpr of the result of `jax.make_jaxpr`, without its constants.

    Since JAX 0.11 open and closed jaxprs have one class, whose attribute `jaxpr` is
    going to be removed.
    """
    return getattr(closed, "jaxpr", closed)


def constants(closed: Any) -> list[Any]:
    """Returns the arrays for the `constvars` of a closed jaxpr; `[]` if it is open."""
    return list(getattr(closed, "consts", []))


# Maps a primitive that calls a program to the parameter that holds the program. After
# differentiation a function with its own derivative rule is a mere call, too.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    CUSTOM_VJP: "call_jaxpr",
}


def called_program(equation: JaxprEqn) -> Any:
    """Returns the jaxpr of an equation that only calls it, such as `jit`.

    The jaxpr is open or closed. `None` for all other equations, and for a call that
    sets shardings or layouts.
    """
    where = _CALLS.get(equation.primitive.name)
    if where is None:
        return None
    for name in ("in_shardings", "out_shardings", "in_layouts", "out_layouts"):
        if any(map(_is_specified, equation.params.get(name, ()))):
            return None
    return equation.params[where]


def _is_specified(sharding: Any) -> bool:
    return sharding is not None and type(sharding).__name__ != "UnspecifiedValue"


def in_scope(caller: JaxprEqn | None, equation: JaxprEqn) -> JaxprEqn:
    """Returns an equation of a called program with the caller's scope before its own.

    An equation in the scope "mlp", called in the scope "layer_0", gets "layer_0/mlp".
    Without a caller the equation is returned unchanged.
    """
    if caller is None or not caller.source_info.name_stack.stack:
        return equation
    outer, source = caller.source_info.name_stack, equation.source_info
    scope = outer + source.name_stack
    return equation.replace(source_info=source.replace(name_stack=scope))


@contextlib.contextmanager
def under(equation: JaxprEqn) -> Iterator[None]:
    """Traces operations in the context under an equation's scope, line and settings.

    `jax.core.eval_jaxpr` does so for each equation, but evaluates whole programs only.
    """
    source = equation.source_info
    scope = source_info_util.current_name_stack() + source.name_stack
    user_context = source_info_util.user_context(source.traceback, name_stack=scope)
    with user_context, equation.ctx.manager:
        yield


def bind_equation(equation: JaxprEqn, operands: Sequence[Any]) -> Sequence[Any]:
    """Returns the results of an equation for other operands; `[result]` for one.

    They are computed under the scope, line and settings of the equation.
    """
    primitive = equation.primitive
    with under(equation):
        params = primitive.get_bind_params(equation.params)
        results = primitive.bind(*operands, **params)
    return results if primitive.multiple_results else [results]


def current_scope() -> str:
    """Returns the scopes around the operation being traced, such as "layer_0/mlp"."""
    return str(source_info_util.current_name_stack())


def source_line(equation: JaxprEqn) -> str:
    """Returns the user's line that made an equation, such as "model.py:12 (loss)"."""
    line = source_info_util.summarize(equation.source_info)  # "path:12:5 (loss)"
    where, _, function = line.rpartition(" (")
    if not where:
        return line  # "unknown"
    path, *numbers = where.split(":")
    return f"{':'.join((Path(path).name, *numbers[:1]))} ({function}"


# Excludes the library's own lines from the source lines of equations.
source_info_util.register_exclusion(str(Path(__file__).parent))


def scan_counts(equation: JaxprEqn) -> tuple[int, int]:
    """Returns the number of constants and of carried values among a scan's operands.

    JAX 0.11 replaced the two counts by one tree of the operands, `ft_in`.
    """
    params = equation.params
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carried, _ = params["ft_in"].update(range(len(equation.invars))).unpack()
    return len(list(consts)), len(list(carried))


def shard_map_arguments(equation: JaxprEqn) -> dict[str, Any]:
    """Returns the arguments of a call of `jax.shard_map`, except the function."""
    params = equation.params
    return {
        "mesh": params["mesh"],
        "in_specs": tuple(params["in_specs"]),
        "out_specs": tuple(params["out_specs"]),
        "axis_names": set(params["newly_manual_axes"]),
        "check_vma": params["check_vma"],
    }


def is_reference(aval: Any) -> bool:
    """Returns whether a type is of mutable references to arrays (`jax.new_ref`)."""
    return hasattr(aval, "inner_aval")


def num_devices(context: mlir.LoweringRuleContext) -> int:
    """Returns the number of devices that a program is lowered for; 0 if unknown yet.

    A lowering rule has no public access to it. On one device nothing is sharded.
    """
    return getattr(context.module_context.axis_context, "num_devices", 0)


def of_module(context: mlir.LoweringRuleContext, kind: type[_T]) -> _T:
    """Returns the one object of class `kind` of the module being lowered.

    The first call for a module creates the object, by `kind()`. The module's list
    `keepalives`, which all its lowering rules share, holds it.
    """
    kept = context.module_context.keepalives
    found = next((each for each in kept if type(each) is kind), None)
    if found is None:
        found = kind()
        kept.append(found)
    return found


def is_export(context: mlir.LoweringRuleContext) -> bool:
    """Returns whether `jax.export` lowers a program, which other versions may run."""
    parameters = context.module_context.lowering_parameters
    return bool(getattr(parameters, "for_export", False))


def concrete(dimension: Any) -> int:
    """Returns the size of a dimension; every symbol in it counts as `_SYMBOL`.

    With `_SYMBOL = 256`: 2*b + 1 -> 513. So values with symbolic sizes have prices that
    can be compared.
    """
    if isinstance(dimension, int) or not jax.export.is_symbolic_dim(dimension):
        return int(dimension)
    values: Any = dict.fromkeys(dimension._get_vars(), _SYMBOL)
    return int(dimension._evaluate(values))


_SYMBOL = 256


def remat(equation: JaxprEqn) -> tuple[Any, Any, bool] | None:
    """Returns the jaxpr, the policy and `prevent_cse` of a call of `jax.checkpoint`.

    `None` for other equations, and for a call that is differentiated already. With
    `jax_remat3`, which is going to replace the primitive, an object of JAX holds the
    three. In JAX 0.10 the object has no `prevent_cse`, which then is `True`.
    """
    params = equation.params
    if equation.primitive.name in ("remat2", "checkpoint"):
        if params["differentiated"]:
            return None
        return params["jaxpr"], params["policy"], params["prevent_cse"]
    found: Any = params.get("_prim")
    if type(found).__name__ != "RematTraced":
        return None
    return found.jaxpr, found.policy, getattr(found, "prevent_cse", True)


@functools.cache
def has_triton() -> bool:
    """Returns whether this JAX has Pallas's Triton backend; if not, warns once.

    JAX recommends Mosaic GPU instead, which cannot replace Triton here:
    docs/performance.md has the reasons.
    """
    if importlib.util.find_spec(_LAZY["triton"]) is not None:
        return True
    logging.getLogger("dropit_jax").warning(
        "This JAX has no Triton backend of Pallas: on GPUs DropIT compresses by plain "
        "JAX operations, which is slower."
    )
    return False


def hush_triton() -> None:
    """Hides the warning that JAX 0.12 gives whenever it lowers a Triton kernel.

    A user cannot avoid the warning, and `has_triton` handles a JAX without Triton. The
    filter is global, for this message alone: XLA calls back into JAX to lower some
    kernels, outside any context of this library.
    """
    warnings.filterwarnings(
        "ignore", "The Pallas Triton backend is deprecated", DeprecationWarning
    )


# Flax: the functions below are for the linen layers, `linen.intercept` and `nnx.drop`.


def flax_function(context: Any) -> Callable[..., Any]:
    """Returns the user's or Flax's function behind an intercepted method.

    If an override calls the method of its base class, the interceptor gets both calls:
    the function tells which of the two methods runs.

    Args:
      context: a `flax.linen.module.InterceptorContext`.
    """
    return context.orig_method.func


def without_flax_wrapper(method: Any) -> Any:
    """Returns a bound method of a module without the wrapper Flax puts on every method.

    The wrapper records a call. A method that calls the method of its base class would
    record two. A method with another wrapper is returned unchanged.
    """
    function = method.__func__
    if function.__code__ is not _flax_wrapper():
        return method
    return functools.partial(function.__wrapped__, method.__self__)


@functools.cache
def _flax_wrapper() -> Any:
    """Returns the code object that Flax's wrappers of all methods share."""
    from flax import linen  # noqa: PLC0415  # not all users have Flax models

    class _Module(linen.Module):
        def __call__(self) -> None:
            """Does nothing."""

    return vars(_Module)["__call__"].__code__


def flax_modules(tree: Any) -> Any:
    """Returns a pytree with `None` for all leaves except modules and variables of nnx.

    A lifted function of nnx applies it to its arguments and returns the pytree beside
    its results, so that `nnx.from_tree` can update the caller's modules.
    """
    from flax import nnx  # noqa: PLC0415  # not all users have Flax models

    return nnx.extract.clear_non_graph_nodes(tree)
