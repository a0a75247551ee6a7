"""Functions that are computed in another way on some platforms.

As `jax.lax.platform_dependent`, which is a choice between branches that XLA has to take
apart in every layer anew. This one is what the platform has, in its place.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

_Operation = Callable[..., Any]


def by_platform(
    default: _Operation,
    *,
    cpu: _Operation | None = None,
    cuda: _Operation | None = None,
) -> _Operation:
    """A function of arrays, which on some platforms is another of the same results.

    All that is traced goes in as an argument.

    Args:
      default: what it is by definition, and where no other is given; a derivative is
        this one's.
      cpu: what it is on a CPU.
      cuda: what it is on an NVIDIA GPU.
    """

    def operation(*operands: Array) -> Any:
        jaxpr, shapes = jax.make_jaxpr(default, return_shape=True)(*operands)
        results = _operation_p.bind(
            *operands,
            default=jaxpr,
            cpu=None if cpu is None else jax.make_jaxpr(cpu)(*operands),
            cuda=None if cuda is None else jax.make_jaxpr(cuda)(*operands),
            mesh=jax.sharding.get_abstract_mesh(),
        )
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return operation


def _run(*operands: Array, **params: Any) -> list[Array]:
    return jax.jit(lambda *operands: _operation_p.bind(*operands, **params))(*operands)


def _lowered(platform: str) -> Callable[..., Any]:
    def run(*operands: Array, mesh: Any, **jaxprs: ClosedJaxpr | None) -> list[Array]:
        jaxpr = jaxprs[platform] or jaxprs["default"]
        assert jaxpr is not None
        with jax.sharding.use_abstract_mesh(mesh):
            return jaxpr_as_fun(jaxpr)(*operands)

    return mlir.lower_fun(run, multiple_results=True)


def _derivative(
    primals: Any, tangents: Any, *, default: ClosedJaxpr, **_: Any
) -> tuple[list[Array], list[Any]]:
    tangents = tuple(map(ad.instantiate_zeros, tangents))
    results, derivatives = jax.jvp(jaxpr_as_fun(default), tuple(primals), tangents)
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
    default: ClosedJaxpr,
    cpu: ClosedJaxpr | None,
    cuda: ClosedJaxpr | None,
    mesh: Any,
) -> tuple[list[Array], list[int]]:
    del mesh

    def mapped(jaxpr: ClosedJaxpr) -> _Operation:
        return jax.vmap(jaxpr_as_fun(jaxpr), axes)

    operation = by_platform(
        mapped(default),
        cpu=None if cpu is None else mapped(cpu),
        cuda=None if cuda is None else mapped(cuda),
    )
    results = operation(*operands)
    return results, [0] * len(results)


_operation_p = Primitive("dropit_by_platform")
_operation_p.multiple_results = True
_operation_p.def_abstract_eval(lambda *_, default, **__: default.out_avals)
_operation_p.def_impl(_run)
ad.primitive_jvps[_operation_p] = _derivative
batching.primitive_batchers[_operation_p] = _batched
mlir.register_lowering(_operation_p, _lowered("default"))
for _platform in ("cpu", "cuda"):
    mlir.register_lowering(_operation_p, _lowered(_platform), platform=_platform)
