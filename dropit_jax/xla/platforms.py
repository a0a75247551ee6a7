"""Functions that are computed in another way on some platforms.

As `jax.lax.platform_dependent`, which is a choice between branches that XLA has to take
apart in every layer anew. This one is what the platform has, in its place.
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


# Whether an exported program may be run by other versions of JAX, to which kernels and
# layouts promise nothing.
_is_for_others = contextvars.ContextVar("is_for_others", default=True)


@contextlib.contextmanager
def exporting_for_this_version() -> Iterator[None]:
    """Exports programs as they run here, not by their plain definitions."""
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
    """A function of arrays, which on some platforms is another of the same results.

    All that is traced goes in as an argument.

    Args:
      default: what it is by definition, and where no other is given; a derivative is
        this one's.
      cpu: what it is on a CPU.
      one_cpu: what it is there in a program for one device, where it need not keep to
        what arrays may be shared out by.
      cuda: what it is on an NVIDIA GPU.

    Returns:
      A function of the arrays, and of one that it comes `after`: on a CPU the first
      operand of `cpu`, and nothing elsewhere, where there are barriers.
    """

    def operation(*operands: Array, after: Array | None = None) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        waited_for = () if after is None else (after,)
        avals = tuple(map(jax.typeof, operands))
        general = _Branch(default, avals, mesh)
        on_cpu, on_one_cpu = (
            given and _Branch(given, (*map(jax.typeof, waited_for), *avals), mesh)
            for given in (cpu, one_cpu)
        )
        on_cuda = cuda and _Branch(cuda, *_on_a_gpu(avals, mesh))
        # What will not run here is traced when it is asked for.
        here = None
        if jax.default_backend() == "cpu":
            alone = jax.device_count() == 1
            here = on_one_cpu if alone and on_one_cpu else on_cpu
        jaxpr, shapes = (here or general).traced
        results = _operation_p.bind(
            *waited_for,
            *operands,
            waits=len(waited_for),
            default=general,
            cpu=on_cpu,
            one_cpu=on_one_cpu,
            cuda=on_cuda,
            partitioning=None if cuda is None else _custom_partitioning(),
            results=tuple(jaxpr.out_avals),
        )
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return operation


# Compared by identity: two functions that are equal may be traced differently.
@dataclasses.dataclass(frozen=True, eq=False)
class _Branch:
    """A function that is traced when it is needed.

    Attributes:
      function: of arrays.
      avals: the types of its arguments.
      mesh: that is in force.
    """

    function: _Operation
    avals: tuple[Any, ...]
    mesh: Any

    @functools.cached_property
    def traced(self) -> tuple[Any, Any]:
        """The function traced, and its results' types."""
        with jax.sharding.use_abstract_mesh(self.mesh):
            return jax.make_jaxpr(self.function, return_shape=True)(*self.avals)

    @property
    def flat(self) -> _Operation:
        """The function of arrays that gives a list of arrays."""
        return jaxpr_as_fun(self.traced[0])


def _on_a_gpu(avals: tuple[Any, ...], mesh: Any) -> tuple[tuple[Any, ...], Any]:
    """The types and the mesh, of some GPU where they are of none.

    From version 0.11 on JAX asks which GPU a kernel is lowered for. Ours are the same
    for all.
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
    """A program that is never run, of an operation with its own way of partitioning.

    Where JAX finds one, it lowers a step for the devices that it knows. Those of a
    GPU's branch are traced too late for it to find.
    """

    def unused(x: Any, *_: Any) -> Any:
        return x

    partitioned = custom_partitioning(unused)
    partitioned.def_partition(partition=unused, sharding_rule="->")
    return jax.make_jaxpr(partitioned)(0.0)


def _run(*operands: Array, **params: Any) -> list[Array]:
    if jax.config.jax_disable_jit:  # then `jax.jit` would come back here
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
    alone = compat.num_devices(context) == 1
    given = one_cpu if one_cpu and alone else cpu
    return _lowered("cpu")(context, *operands, cpu=given, one_cpu=None, **params)


def _derivative(
    primals: Any, tangents: Any, *, waits: int, default: _Branch, **_: Any
) -> tuple[list[Array], list[Any]]:
    primals, tangents = list(primals[waits:]), list(tangents[waits:])
    moving = [i for i, each in enumerate(tangents) if not isinstance(each, ad.Zero)]

    def of_moving(*values: Array) -> list[Array]:
        operands = dict(enumerate(primals)) | dict(zip(moving, values, strict=True))
        given: list[Array] = default.flat(*operands.values())
        return given

    # With tangents of zero for the others, JAX 0.12 cannot transpose a barrier.
    results, derivatives = jax.jvp(
        of_moving, [primals[i] for i in moving], [tangents[i] for i in moving]
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
        # One result for the whole batch, and of what is only waited for, one element.
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
            flat = jax.vmap(branch.flat, axes)  # traced no earlier
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
