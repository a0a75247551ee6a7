"""Keeps XLA from recomputing arrays for the backward pass before it needs them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from jax import lax
from jaxtyping import Array

from dropit_jax import compat
from dropit_jax.compat import Primitive, ad, batching, mlir
from dropit_jax.xla import cpu_calls
from dropit_jax.xla.partitioning import any_element
from dropit_jax.xla.platforms import by_platform

T = TypeVar("T")


def barrier(operands: T) -> T:
    """Returns a pytree of arrays after `lax.optimization_barrier`; on a CPU, unchanged.

    On a CPU a barrier would keep XLA from cancelling a reshape before it with the
    inverse after it, and in versions of JAX below 0.12 would order nothing. There,
    use `call_after` or `barrier_of_passes`.
    """
    return _barrier(operands, on_one_cpu=False)


def barrier_of_passes(operands: T) -> T:
    """Returns a pytree of arrays after `lax.optimization_barrier`, also on one CPU.

    A CPU program for several devices has none: XLA would order collectives by it, so
    that it no longer joins them.
    """
    return _barrier(operands, on_one_cpu=True)


def _barrier(operands: T, on_one_cpu: bool) -> T:
    leaves, structure = jax.tree.flatten(operands)
    results = _barrier_p.bind(*leaves, on_one_cpu=on_one_cpu)
    return jax.tree.unflatten(structure, results)


def read_after(after: Array, operands: T) -> T:
    """Returns a pytree of arrays, delayed until `after` is computed.

    On a CPU, returns it unchanged. On an NVIDIA GPU, unlike with `barrier`, `after`
    need not be written to memory: one GPU kernel can compute it and everything that
    reads it and the operands.
    """
    leaves, structure = jax.tree.flatten(operands)
    if not leaves or not after.size:
        return operands
    return jax.tree.unflatten(structure, _read_after(after, leaves))


# Jitted, so that all arrays of one shape share one trace.
@functools.partial(jax.jit, inline=True)
def _read_after(after: Array, operands: list[Array]) -> list[Array]:
    def wait_for_all(*operands: Array) -> Sequence[Array]:
        return lax.optimization_barrier(operands)[:-1]

    def wait_for_one(*operands: Array) -> Sequence[Array]:
        return wait_for_all(*operands[:-1], any_element(operands[-1]))

    def unchanged(*operands: Array) -> Sequence[Array]:
        return operands[:-1]

    operation = by_platform(wait_for_all, cpu=unchanged, cuda=wait_for_one)
    return list(operation(*operands, lax.stop_gradient(after)))


def call_after(
    after: Array | None, function: Callable[..., Array], *operands: Array
) -> Array:
    """Returns `function(*operands)`, on a CPU computed after `after`.

    On other platforms `after` has no effect.

    Args:
      after: an array; `None`: XLA chooses when to compute the result.
      function: a function of arrays, without arrays in its closure.
      *operands: its arguments.
    """
    if after is None:
        return function(*operands)
    operation = by_platform(function, cpu=cpu_calls.call_after_operand(function))
    result: Array = operation(*operands, after=after)
    return result


_barrier_p = Primitive("optimization_barrier_by_platform")
_barrier_p.multiple_results = True
_barrier_p.def_impl(lambda *operands, **_: list(operands))
_barrier_p.def_abstract_eval(lambda *operands, **_: list(operands))


def _derivative(
    primals: Any, tangents: Any, **params: Any
) -> tuple[list[Array], list[Array]]:
    tangents = [ad.instantiate_zeros(tangent) for tangent in tangents]
    return _barrier_p.bind(*primals, **params), _barrier_p.bind(*tangents, **params)


def _transposed(cotangents: Any, *_: Any, **__: Any) -> Any:
    return cotangents


def _batched(operands: Any, axes: Any, **params: Any) -> tuple[list[Array], Any]:
    return _barrier_p.bind(*operands, **params), axes


def _barred(*operands: Array, **_: Any) -> tuple[Array, ...]:
    return lax.optimization_barrier(operands)


_lowered = mlir.lower_fun(_barred, multiple_results=True)


def _lowered_on_cpu(context: Any, *operands: Any, on_one_cpu: bool) -> Any:
    if on_one_cpu and compat.num_devices(context) == 1:
        return _lowered(context, *operands)
    return operands


ad.primitive_jvps[_barrier_p] = _derivative
ad.primitive_transposes[_barrier_p] = _transposed
batching.primitive_batchers[_barrier_p] = _batched
mlir.register_lowering(_barrier_p, _lowered)
mlir.register_lowering(_barrier_p, _lowered_on_cpu, platform="cpu")
