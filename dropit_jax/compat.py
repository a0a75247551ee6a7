"""Everything private or experimental of JAX and Flax that the library uses.

No other file of the library reaches past their public interfaces;
`tests/dropit_jax/test_compat.py` sees to it, and fails with the name of what is gone.
Each entry says why it is needed, and what takes its place.
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

# Tells XLA how to share out a kernel. `jax.shard_map` does where the axes of a mesh are
# Explicit or Manual; of Auto ones XLA has to be told.
from jax.experimental.custom_partitioning import custom_partitioning

# Lays an array out in a GPU's memory. Nothing else does so inside of a function.
from jax.experimental.layout import Layout, with_layout_constraint

# Marks a call as not to be inlined. Nothing else reaches XLA's CPU compiler.
from jax.experimental.xla_metadata import set_xla_metadata

# `jax.extend` is where JAX wants extensions to take these from, and promises little:
# traced programs, which `memory` reads and `platforms` holds (`jaxprs_in_params` gives
# open ones, whatever a version of JAX keeps in the parameters of an equation); and
# primitives, as `jax.lax.platform_dependent` leaves a choice in the program that XLA
# takes apart in every layer anew. `jax.experimental.hijax` may take their place.
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

# Groups of arrays that are sharded alike: `jax.experimental.shard_alike` takes pairs.
from jax.extend.mlir.dialects import sdy

# The rules of our primitives.
from jax.interpreters import ad, batching, mlir

# Tells which residuals a backward pass reads.
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

# Modules that take long to import, or may be gone: attributes of this module all the
# same. `topologies` describes GPUs that are not there. `pallas` writes kernels, and
# `triton` is its backend for GPUs, deprecated from JAX 0.12 on: `has_triton`.
_LAZY = {
    "pallas": "jax.experimental.pallas",
    "topologies": "jax.experimental.topologies",
    "triton": "jax.experimental.pallas.triton",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(_LAZY[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# Names of primitives, by which `memory` follows an array through a traced program: JAX
# has objects for them in `jax.extend.core.primitives`, but not for all of these. A call
# of a function with a backward rule of its own is not differentiated if it is there.
CUSTOM_VJP = "custom_vjp_call"
NAME = "name"  # `jax.ad_checkpoint.checkpoint_name`
REDUCE_PRECISION = "reduce_precision"  # with it `jax.checkpoint` marks what it saves
SCAN = "scan"
# They call a function of Python on the host, which no other machine's compiler takes.
HOST_CALLS = frozenset(
    {"debug_callback", "debug_print", "io_callback", "pure_callback"}
)
# Those that return an operand as it is, if size and dtype stay the same.
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
    """The program that `jax.make_jaxpr` made, without its constants.

    From JAX 0.11 on there is one class for both, and the attribute is to go.
    """
    return getattr(closed, "jaxpr", closed)


def constants(closed: Any) -> list[Any]:
    """The arrays that the `constvars` of a program stand for; none of an open one."""
    return list(getattr(closed, "consts", []))


# A call of a program, by the name of the primitive: where the program is. That of a
# function with a derivative of its own is only a call once it is differentiated.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    CUSTOM_VJP: "call_jaxpr",
}


def called_program(equation: JaxprEqn) -> Any:
    """The program that an equation calls with its operands; `None` if it does more.

    A call that lays down shardings does more.
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
    """An equation of a program that is called, under the scope of the call."""
    if caller is None or not caller.source_info.name_stack.stack:
        return equation
    outer, source = caller.source_info.name_stack, equation.source_info
    scope = outer + source.name_stack
    return equation.replace(source_info=source.replace(name_stack=scope))


@contextlib.contextmanager
def under(equation: JaxprEqn) -> Iterator[None]:
    """Traces what follows under an equation's scope, source line and settings.

    As in the loop of `jax.core.eval_jaxpr`, which takes whole programs alone.
    """
    source = equation.source_info
    scope = source_info_util.current_name_stack() + source.name_stack
    user_context = source_info_util.user_context(source.traceback, name_stack=scope)
    with user_context, equation.ctx.manager:
        yield


def bind_equation(equation: JaxprEqn, operands: Sequence[Any]) -> Sequence[Any]:
    """The results of an equation for these operands."""
    primitive = equation.primitive
    with under(equation):
        params = primitive.get_bind_params(equation.params)
        results = primitive.bind(*operands, **params)
    return results if primitive.multiple_results else [results]


def current_scope() -> str:
    """The scopes that are open where something is traced."""
    return str(source_info_util.current_name_stack())


def source_line(equation: JaxprEqn) -> str:
    """The file, line and function of the user that an equation comes from."""
    line = source_info_util.summarize(equation.source_info)
    where, _, function = line.partition(" ")
    path, *numbers = where.split(":")
    return " ".join(filter(None, (":".join((Path(path).name, *numbers[:1])), function)))


# The library's own lines are nobody's source.
source_info_util.register_exclusion(str(Path(__file__).parent))


def scan_counts(equation: JaxprEqn) -> tuple[int, int]:
    """How many operands of a `scan` are constants, and how many are carried.

    JAX 0.11 put one tree of the operands, `ft_in`, in place of the two counts.
    """
    params = equation.params
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carried, _ = params["ft_in"].update(range(len(equation.invars))).unpack()
    return len(list(consts)), len(list(carried))


def shard_map_arguments(equation: JaxprEqn) -> dict[str, Any]:
    """The arguments that `jax.shard_map` was called with, beside the function."""
    params = equation.params
    return {
        "mesh": params["mesh"],
        "in_specs": tuple(params["in_specs"]),
        "out_specs": tuple(params["out_specs"]),
        "axis_names": set(params["newly_manual_axes"]),
        "check_vma": params["check_vma"],
    }


def is_reference(aval: Any) -> bool:
    """Whether values of this type are mutable references to arrays (`jax.new_ref`)."""
    return hasattr(aval, "inner_aval")


def num_devices(context: mlir.LoweringRuleContext) -> int:
    """For how many devices a program is lowered; 0 if that is not known yet.

    On one device there is nothing to share out. JAX tells a lowering rule nowhere else.
    """
    return getattr(context.module_context.axis_context, "num_devices", 0)


def of_module(context: mlir.LoweringRuleContext, kind: type[_T]) -> _T:
    """The object of a class that belongs to the module being lowered, made if need be.

    `keepalives` is the one thing that all rules of a module share and may add to.
    """
    kept = context.module_context.keepalives
    found = next((each for each in kept if type(each) is kind), None)
    if found is None:
        found = kind()
        kept.append(found)
    return found


def is_export(context: mlir.LoweringRuleContext) -> bool:
    """Whether a program is lowered by `jax.export`, to be run by other versions."""
    parameters = context.module_context.lowering_parameters
    return bool(getattr(parameters, "for_export", False))


def concrete(dimension: Any) -> int:
    """The size of a dimension; of a symbolic one, for symbols of `_SYMBOL` each.

    Prices of values are compared, which symbols cannot be.
    """
    if isinstance(dimension, int) or not jax.export.is_symbolic_dim(dimension):
        return int(dimension)
    values: Any = dict.fromkeys(dimension._get_vars(), _SYMBOL)
    return int(dimension._evaluate(values))


_SYMBOL = 256


def remat(equation: JaxprEqn) -> tuple[Any, Any, bool] | None:
    """The program, the policy and `prevent_cse` of a call of `jax.checkpoint`.

    `None` of other equations, and of a call that is differentiated. Under `jax_remat3`
    these are in an object of JAX's, which is to take the place of the primitive; that
    of JAX 0.10 has no `prevent_cse`.
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
    """Whether this JAX has Pallas's Triton backend; once, a warning if not.

    Mosaic GPU, which JAX names as its successor, cannot take its place here:
    docs/performance.md says why.
    """
    if importlib.util.find_spec(_LAZY["triton"]) is not None:
        return True
    logging.getLogger("dropit_jax").warning(
        "This JAX has no Triton backend of Pallas: on GPUs DropIT compresses by plain "
        "JAX operations, which is slower."
    )
    return False


def hush_triton() -> None:
    """Ignores the warning that JAX 0.12 gives wherever a Triton kernel is lowered.

    A user can do nothing about it, and `has_triton` deals with the removal. It is a
    filter for this one message, as JAX lowers some kernels in a call of XLA's, where no
    context of ours is around.
    """
    warnings.filterwarnings(
        "ignore", "The Pallas Triton backend is deprecated", DeprecationWarning
    )


# The layers and `intercept` of linen, and `nnx.drop`, use the parts of Flax below.


def flax_function(context: Any) -> Callable[..., Any]:
    """The function that Flax wrapped as the method that an interceptor is told of.

    By it a method of Flax's own is told from one that overrides it.

    Args:
      context: `flax.linen.module.InterceptorContext`.
    """
    return context.orig_method.func


def without_flax_wrapper(method: Any) -> Any:
    """A bound method of a module without the wrapper that Flax gives every method.

    By the wrapper Flax takes note of a call, which is one call too many where a method
    calls that of its base class. A method that somebody else wrapped stays as it is.
    """
    function = method.__func__
    if function.__code__ is not _flax_wrapper():
        return method
    return functools.partial(function.__wrapped__, method.__self__)


@functools.cache
def _flax_wrapper() -> Any:
    """The code of Flax's wrappers, which is one for all methods."""
    from flax import linen  # noqa: PLC0415  # not all users have Flax models

    class _Module(linen.Module):
        def __call__(self) -> None:
            """Nothing."""

    return vars(_Module)["__call__"].__code__


def flax_modules(tree: Any) -> Any:
    """A tree with `None` for all leaves but modules and variables of nnx.

    Such a tree a lifted function of nnx returns beside its results, for what changed in
    its arguments; `nnx.from_tree` finds them in it.
    """
    from flax import nnx  # noqa: PLC0415  # not all users have Flax models

    return nnx.extract.clear_non_graph_nodes(tree)
