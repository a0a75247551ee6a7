"""Selects an implementation of a function for the platform that it is lowered for.

`jax.lax.platform_dependent` does the same by a branch, which XLA has to remove in every
layer anew. Here only the platform's implementation is in the program.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding
from jaxtyping import Array

from dropit_jax import compat
from dropit_jax.compat import (
    Primitive,
    Var,
    ad,
    batching,
    custom_partitioning,
    jaxpr_as_fun,
    mlir,
)

_Operation = Callable[..., Any]


# Whether an exported program may be run by other versions of JAX, with which our GPU
# kernels and layouts may not work.
_is_for_others = contextvars.ContextVar("is_for_others", default=True)


@contextlib.contextmanager
def exporting_for_this_version() -> Iterator[None]:
    """Makes `jax.export` keep GPU implementations while the context is open.

    Outside of the context, programs for NVIDIA GPUs are exported with the default
    implementations, as another version of JAX may run them.
    """
    token = _is_for_others.set(False)
    try:
        yield
    finally:
        _is_for_others.reset(token)


def by_platform(
    default: _Operation,
    *,
    cpu: _Operation | None = None,
    one_cpu: _Operation | None = None,
    cuda: _Operation | None = None,
) -> _Operation:
    """Returns a function of arrays that has other implementations on some platforms.

    Traced arrays must be arguments: an implementation may not close over them.

    Args:
      default: defines the results; it is used on all other platforms, and for
        derivatives.
      cpu: implementation on a CPU.
      one_cpu: implementation in a CPU program for one device, where it need not keep
        shardings.
      cuda: implementation on an NVIDIA GPU.

    Returns:
      A function of the arrays, with a keyword `after`: an array that is the first
      operand of `cpu`, which so waits for it. Other platforms, which have barriers,
      ignore it.
    """

    def operation(*operands: Array, after: Array | None = None) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        waited_for = () if after is None else (after,)
        avals = tuple(map(jax.typeof, operands))
        default_branch = _Branch(default, avals, mesh)
        on_cpu, on_one_cpu = (
            given and _Branch(given, (*map(jax.typeof, waited_for), *avals), mesh)
            for given in (cpu, one_cpu)
        )
        on_cuda = cuda and _Branch(cuda, *_gpu_types(avals, mesh))
        # Trace only the implementation of this platform; the others when lowered.
        here = None
        if jax.default_backend() == "cpu":
            one_device = jax.device_count() == 1
            here = on_one_cpu if one_device and on_one_cpu else on_cpu
        jaxpr, shapes = (here or default_branch).traced
        results = _operation_p.bind(
            *waited_for,
            *operands,
            waits=len(waited_for),
            default=default_branch,
            cpu=on_cpu,
            one_cpu=on_one_cpu,
            cuda=on_cuda,
            partitioning=None if cuda is None else _custom_partitioning(),
            results=tuple(jaxpr.out_avals),
        )
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return operation


# Compared by identity: equal functions may be traced differently.
@dataclasses.dataclass(frozen=True, eq=False)
class _Branch:
    """An implementation, which is traced when it is needed.

    Attributes:
      function: a function of arrays.
      avals: types of its arguments.
      mesh: the mesh in force.
    """

    function: _Operation
    avals: tuple[Any, ...]
    mesh: Any

    @functools.cached_property
    def traced(self) -> tuple[Any, Any]:
        """The closed jaxpr of the function, and the pytree of its results' types."""
        with jax.sharding.use_abstract_mesh(self.mesh):
            return jax.make_jaxpr(self.function, return_shape=True)(*self.avals)

    @property
    def flat(self) -> _Operation:
        """The function, with its results as a list of arrays."""
        return jaxpr_as_fun(self.traced[0])


def _gpu_types(avals: tuple[Any, ...], mesh: Any) -> tuple[tuple[Any, ...], Any]:
    """Returns the types and the mesh, moved to some GPU if they are on none.

    From version 0.11 on JAX asks which GPU a kernel is lowered for. Our kernels are the
    same for all.
    """
    device = mesh.abstract_device
    if device.platform == "gpu" if device else jax.default_backend() == "gpu":
        return avals, mesh
    some = jax.sharding.AbstractDevice("NVIDIA A100", None, "gpu")
    on_gpu = mesh.update(abstract_device=some)

    def moved(aval: Any) -> Any:
        if aval.sharding.mesh.empty:
            return aval
        return aval.update(sharding=NamedSharding(on_gpu, aval.sharding.spec))

    return tuple(map(moved, avals)), on_gpu


@functools.cache
def _custom_partitioning() -> Any:
    """Returns a jaxpr with a `custom_partitioning` equation, which never runs.

    JAX searches the jaxprs in equations' parameters for such an equation; if there is
    one, JAX lowers the step for the actual devices. The GPU implementation may have
    one, but is traced only after the search: this jaxpr stands in for it.
    """

    def unused(x: Any, *_: Any) -> Any:
        return x

    partitioned = custom_partitioning(unused)
    partitioned.def_partition(partition=unused, sharding_rule="->")
    return jax.make_jaxpr(partitioned)(0.0)


def _run(*operands: Array, **params: Any) -> list[Array]:
    if jax.config.jax_disable_jit:  # `jax.jit` would call `_run` again
        results: list[Array] = params["default"].flat(*operands[params["waits"] :])
        return results
    return jax.jit(lambda *operands: _operation_p.bind(*operands, **params))(*operands)


def _lowered(platform: str) -> Callable[..., Any]:
    def lower(context: Any, *operands: Any, waits: int, **params: Any) -> Any:
        given = params[platform] or params["default"]
        if platform == "cuda":
            compat.hush_triton()
            if compat.is_export(context) and _is_for_others.get():
                given = params["default"]
        if given is not params["cpu"]:
            operands = operands[waits:]
        context = context.replace(avals_in=list(given.avals))
        jaxpr = compat.open_jaxpr(given.traced[0])
        by_variable: dict[Any, Any]
        by_variable = dict(zip(jaxpr.invars, operands, strict=True))
        # An identity adds no operation to the program.
        if all(isinstance(v, Var) and v in by_variable for v in jaxpr.outvars):
            return [by_variable[variable] for variable in jaxpr.outvars]
        run = functools.partial(_run_branch, given)
        return mlir.lower_fun(run, multiple_results=True)(context, *operands)

    return lower


def _run_branch(branch: _Branch, *operands: Array) -> list[Array]:
    with jax.sharding.use_abstract_mesh(branch.mesh):
        results: list[Array] = branch.flat(*operands)
        return results


def _lowered_on_cpu(
    context: Any,
    *operands: Any,
    cpu: _Branch | None,
    one_cpu: _Branch | None,
    **params: Any,
) -> Any:
    one_device = compat.num_devices(context) == 1
    given = one_cpu if one_cpu and one_device else cpu
    return _lowered("cpu")(context, *operands, cpu=given, one_cpu=None, **params)


def _derivative(
    primals: Any, tangents: Any, *, waits: int, default: _Branch, **_: Any
) -> tuple[list[Array], list[Any]]:
    primals, tangents = list(primals[waits:]), list(tangents[waits:])
    nonzero = [i for i, each in enumerate(tangents) if not isinstance(each, ad.Zero)]

    def of_nonzero(*values: Array) -> list[Array]:
        operands = dict(enumerate(primals)) | dict(zip(nonzero, values, strict=True))
        given: list[Array] = default.flat(*operands.values())
        return given

    # With tangents of zero for the others, JAX 0.12 cannot transpose a barrier.
    results, derivatives = jax.jvp(
        of_nonzero, [primals[i] for i in nonzero], [tangents[i] for i in nonzero]
    )
    return results, [
        ad.Zero(jax.typeof(result).to_tangent_aval())
        if derivative.dtype == jax.dtypes.float0
        else derivative
        for result, derivative in zip(results, derivatives, strict=True)
    ]


def _batched(
    operands: Any,
    axes: Any,
    *,
    waits: int,
    default: _Branch,
    cpu: _Branch | None,
    one_cpu: _Branch | None,
    cuda: _Branch | None,
    **params: Any,
) -> tuple[list[Array], list[Any]]:
    if all(axis is None for axis in axes[waits:]):
        # One result for the batch; to wait for one element of `after` is enough.
        first = (lax.index_in_dim(x, 0, axes[0], False) for x in operands[:waits])
        results = _operation_p.bind(
            *first,
            *operands[waits:],
            waits=waits,
            default=default,
            cpu=cpu,
            one_cpu=one_cpu,
            cuda=cuda,
            **params,
        )
        return results, [None] * len(results)

    def mapped(branch: _Branch, axes: Any) -> _Operation:
        def function(*operands: Array) -> list[Array]:
            # `branch.flat` traces: not before this function is traced itself.
            flat = jax.vmap(branch.flat, axes)
            return flat(*operands)

        return function

    operation = by_platform(
        mapped(default, axes[waits:]),
        cpu=None if cpu is None else mapped(cpu, axes),
        one_cpu=None if one_cpu is None else mapped(one_cpu, axes),
        cuda=None if cuda is None else mapped(cuda, axes[waits:]),
    )
    results = operation(*operands[waits:], after=operands[0] if waits else None)
    return results, [0] * len(results)


_operation_p = Primitive("dropit_by_platform")
_operation_p.multiple_results = True
_operation_p.def_abstract_eval(lambda *_, results, **__: results)
_operation_p.def_impl(_run)
ad.primitive_jvps[_operation_p] = _derivative
batching.primitive_batchers[_operation_p] = _batched
mlir.register_lowering(_operation_p, _lowered("default"))
mlir.register_lowering(_operation_p, _lowered_on_cpu, platform="cpu")
mlir.register_lowering(_operation_p, _lowered("cuda"), platform="cuda")
