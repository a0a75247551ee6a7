"""One equation for a computation, until JAX runs the program that holds it.

JAX traces the forward rule of an operation in a loop, a checkpoint or an inner
`jax.jit` on its own, where nothing shows that two operations read the same array.
There `cached` records one equation. When JAX evaluates the rule's program among the
equations of the others, for a derivative, that equation gives way to the computation,
once for all that compute the same of the same arrays. (The computation cannot go into
the forward pass itself: it would be there where nothing is differentiated.)
"""

import contextvars
import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from dropit_jax import compat, sharing
from dropit_jax.compat import Primitive, ad, batching, mlir

# From arrays to a pytree of arrays; hashable, equal to those that compute the same.
Computation = Callable[..., Any]

# Arrays that `cached` may be given where a derivative is being taken; `None` outside.
_direct: contextvars.ContextVar[tuple[Any, ...] | None]
_direct = contextvars.ContextVar("direct", default=None)


def cached(compute: Computation, direct: tuple[Any, ...], *operands: Any) -> Any:
    """`compute(*operands)`, in a forward rule.

    Args:
      compute: makes a pytree of arrays from the operands.
      direct: of a call, `compat.beneath` its first operand. If the rule gets one of
        them, JAX is taking the derivative of that very call, and nothing is deferred.
      *operands: arrays.
    """
    if any(operands[0] is each for each in direct):
        return _once(compute, *operands)
    jaxpr, shapes = jax.make_jaxpr(compute, return_shape=True)(*operands)
    token = _direct.set(direct)
    try:
        results = tuple(jaxpr.out_avals)
        leaves = _deferred_p.bind(*operands, compute=compute, results=results)
    finally:
        _direct.reset(token)
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _once(compute: Computation, *operands: Any) -> Any:
    return sharing.once(lambda: compute(*operands), operands, compute)


class _Deferred(Primitive):
    """A primitive that is its computation, unless it is recorded or `vmap` maps it."""

    def bind(self, *operands: Any, **params: Any) -> Any:
        if _direct.get() is not None or any(map(compat.is_mapped, operands)):
            return super().bind(*operands, **params)
        return _computed(*operands, **params)


def _computed(*operands: Any, compute: Computation, **_: Any) -> list[Any]:
    return jax.tree.leaves(_once(compute, *operands))


@dataclasses.dataclass(frozen=True)
class _Mapped:
    """A computation along an axis of its operands."""

    compute: Computation
    axes: tuple[int | None, ...]

    def __call__(self, *operands: Any) -> Any:
        return jax.vmap(self.compute, self.axes)(*operands)


def _batched(
    operands: Any, axes: Any, *, compute: Computation, **_: Any
) -> tuple[list[Any], list[int]]:
    # The rule of an operation that is mapped may be traced on its own as well.
    mapped = cached(_Mapped(compute, tuple(axes)), _direct.get() or (), *operands)
    leaves = jax.tree.leaves(mapped)
    return leaves, [0] * len(leaves)


def _derivative(
    operands: Any, _: Any, *, compute: Computation, results: Any
) -> tuple[list[Any], list[Any]]:
    """What is cached has no derivative: that of the product says so."""
    zeros = [ad.Zero(aval.to_tangent_aval()) for aval in results]
    return _computed(*operands, compute=compute), zeros


_deferred_p = _Deferred("dropit_deferred")
_deferred_p.multiple_results = True
_deferred_p.def_abstract_eval(lambda *_, results, **__: results)
_deferred_p.def_impl(_computed)
ad.primitive_jvps[_deferred_p] = _derivative
batching.primitive_batchers[_deferred_p] = _batched
mlir.register_lowering(
    _deferred_p, mlir.lower_fun(_computed, multiple_results=True), cacheable=False
)
