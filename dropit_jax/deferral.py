"""One equation for a computation, until JAX runs the program that holds it.

JAX traces the forward rule of an operation in a loop, a checkpoint or an inner
`jax.jit` on its own, where nothing shows that two operations read the same array.
There `computed` records one equation. When JAX evaluates the rule's program among the
equations of the others, for a derivative, that equation gives way to the computation,
once for all that compute the same of the same arrays. (The computation cannot go into
the forward pass itself: it would be there where nothing is differentiated.)
"""

import contextlib
import contextvars
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax

from dropit_jax import compat, sharing
from dropit_jax.compat import Primitive, ad, batching, mlir

T = TypeVar("T")


class Origin:
    """Where an operand of a call comes from: it, and the arrays beneath its tracers.

    All references are weak.
    """

    def __init__(self, operand: Any = None):
        self._references: list[weakref.ref[Any]] = []
        for array in compat.beneath(operand):
            with contextlib.suppress(TypeError):  # of what cannot be referred to
                self._references.append(weakref.ref(array))

    def holds(self, array: Any) -> bool:
        """Whether it is one of these.

        If a forward rule is given one, JAX is taking the derivative of that very call.
        """
        return any(reference() is array for reference in self._references)


# Of the operand of the computation that is being recorded; `None` outside.
_origin: contextvars.ContextVar[Origin | None]
_origin = contextvars.ContextVar("origin", default=None)


@contextlib.contextmanager
def _recording(origin: Origin) -> Iterator[None]:
    token = _origin.set(origin)
    try:
        yield
    finally:
        _origin.reset(token)


def computed(compute: Callable[..., T], origin: Origin, *operands: Any) -> T:
    """Returns `compute(*operands)`, in a forward rule; deferred if it has to be.

    Args:
      compute: makes a pytree of arrays from the operands. It is hashable, and equal to
        those that compute the same.
      origin: of the call's first operand.
      *operands: the rule's.
    """
    if origin.holds(operands[0]):
        return _shared(compute, *operands)
    jaxpr, shapes = jax.make_jaxpr(compute, return_shape=True)(*operands)
    with _recording(origin):
        results = tuple(jaxpr.out_avals)
        leaves = _deferred_p.bind(*operands, compute=compute, results=results)
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _shared(compute: Callable[..., T], *operands: Any) -> T:
    return sharing.once(lambda: compute(*operands), operands, compute)


class _Deferred(Primitive):
    """A primitive that is its computation, unless recorded or within `jax.vmap`."""

    def bind(self, *operands: Any, **params: Any) -> Any:
        origin = _origin.get()
        if origin is None and not compat.is_mapping():
            return _leaves(*operands, **params)
        # What `vmap` does not map it binds once more, around itself.
        with _recording(origin or Origin()):
            return super().bind(*operands, **params)


def _leaves(*operands: Any, compute: Callable[..., Any], **_: Any) -> list[Any]:
    return jax.tree.leaves(_shared(compute, *operands))


@dataclasses.dataclass(frozen=True)
class _Mapped:
    """A computation along an axis of its operands."""

    compute: Callable[..., Any]
    axes: tuple[int | None, ...]

    def __call__(self, *operands: Any) -> Any:
        return jax.vmap(self.compute, self.axes)(*operands)


def _batched(
    operands: Any, axes: Any, *, compute: Callable[..., Any], **_: Any
) -> tuple[list[Any], list[int]]:
    # The rule of an operation that is mapped may be traced on its own as well.
    mapped = computed(
        _Mapped(compute, tuple(axes)), _origin.get() or Origin(), *operands
    )
    leaves = jax.tree.leaves(mapped)
    return leaves, [0] * len(leaves)


def _derivative(
    operands: Any, _: Any, *, compute: Callable[..., Any], results: Any
) -> tuple[list[Any], list[Any]]:
    """Returns tangents of zero: `derivatives.once` refuses those that are read."""
    zeros = [ad.Zero(aval.to_tangent_aval()) for aval in results]
    return _leaves(*operands, compute=compute), zeros


_deferred_p = _Deferred("dropit_deferred")
_deferred_p.multiple_results = True
_deferred_p.def_abstract_eval(lambda *_, results, **__: results)
_deferred_p.def_impl(_leaves)
ad.primitive_jvps[_deferred_p] = _derivative
batching.primitive_batchers[_deferred_p] = _batched
mlir.register_lowering(
    _deferred_p, mlir.lower_fun(_leaves, multiple_results=True), cacheable=False
)
