"""Kernels where there is an NVIDIA GPU, their twins elsewhere."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from dropit_jax.storage.kernels import definitions
from dropit_jax.storage.kernels import plan as plans
from dropit_jax.storage.kernels.definitions import Positions
from dropit_jax.storage.kernels.on_gpu import kernel_or_twin
from dropit_jax.storage.kernels.plan import Plan
from dropit_jax.xla import calls
from dropit_jax.xla.platforms import by_platform

# On arrays of the same leading axes; the results have them too.
_Operation = Callable[..., Any]


# JAX keeps what it has traced: layers of one shape are traced once, not each.
@functools.partial(jax.jit, static_argnames="plan", inline=True)
def compress(
    x: Float[Array, "*rows units elements"], plan: Plan
) -> tuple[Float[Array, "*rows units kept"], Positions]:
    """`twins.compress`, in one pass where there is a kernel for it.

    It has no gradient: what is kept is what a gradient is computed from.
    """
    twin = functools.partial(definitions.compress, plan=plan)
    kernel = functools.partial(_compress_kernel, plan=plan)
    x = lax.stop_gradient(x)
    if not _within_reach(plan, x):
        return twin(x)
    operation = by_platform(
        twin,
        cpu=_compress_call(plan),
        one_cpu=_compress_call(plan, alone=True),
        cuda=kernel_or_twin(kernel, twin, results=2),
    )
    return operation(x)


@functools.partial(jax.jit, static_argnames=("plan", "dtype"), inline=True)
def decompress(
    values: Float[Array, "*rows units kept"],
    positions: Positions,
    plan: Plan,
    dtype: jax.typing.DTypeLike,
    after: Shaped[Array, "..."] | None = None,
) -> Float[Array, "*rows units elements"]:
    """`twins.decompress`, in one pass where there is a kernel for it.

    On a CPU it is not computed before `after` is.
    """
    dtype = jnp.dtype(dtype)
    return _decompress_differentiably(plan, dtype, values, positions, after)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _decompress_differentiably(
    plan: Plan, dtype: jnp.dtype, values: Array, positions: Array, after: Array | None
) -> Array:
    twin = functools.partial(definitions.decompress, plan=plan, dtype=dtype)
    kernel = functools.partial(_decompress_kernel, plan=plan, dtype=dtype)
    if not _within_reach(plan, values):
        return twin(values, positions)
    operation = by_platform(
        twin,
        cpu=_decompress_call(functools.partial(twin, by_reduction=True)),
        cuda=kernel_or_twin(kernel, twin, results=1),
    )
    return operation(values, positions, after=after)


def _decompress_forward(
    plan: Plan, dtype: jnp.dtype, values: Array, positions: Array, after: Array | None
) -> tuple[Array, Any]:
    # A kernel has no gradient, and neither have the bits that its twin works on.
    def placed(values: Array) -> Array:
        return definitions.placed(values.astype(dtype), positions, plan)

    _, pullback = jax.vjp(placed, values)
    whole = _decompress_differentiably(plan, dtype, values, positions, after)
    return whole, pullback


def _decompress_backward(
    plan: Plan, dtype: jnp.dtype, pullback: Any, cotangent: Array
) -> tuple[Array, None, None]:
    del plan, dtype
    return (*pullback(cotangent), None, None)


_decompress_differentiably.defvjp(_decompress_forward, _decompress_backward)


# These import Pallas, which takes long, where a program for a GPU is made.
def _compress_kernel(x: Array, plan: Plan) -> Any:
    from dropit_jax.storage.kernels import compress  # noqa: PLC0415

    return compress.compress(x, plan)


def _decompress_kernel(
    values: Array, positions: Array, plan: Plan, dtype: jnp.dtype
) -> Array:
    from dropit_jax.storage.kernels import decompress  # noqa: PLC0415

    return decompress.decompress(values, positions, plan, dtype)


def _compress_call(plan: Plan, alone: bool = False) -> _Operation:
    """`twins.compress` as a call of a few axes.

    It takes whole rows, as products do: XLA would compute an activation twice that is
    read in two shapes, and it would copy what has axes of size 1.

    Args:
      plan: how chunks are stored.
      alone: whether it is for one device, on which `twins.before_first` is given too.
    """

    def call(x: Array) -> Any:
        *rows, units, elements = x.shape
        single = _single(x)
        squeezed = [size for size in (*rows, units) if size != 1]
        before = definitions.before_first(squeezed, plan) if alone else None

        def inside(x: Array, *before: Array) -> Any:
            chunks = x.reshape(*squeezed, elements)
            x, *others = (lax.expand_dims(x, single) for x in (chunks, *before))
            results = definitions.compress(x, plan, *others)
            return jax.tree.map(lambda x: lax.squeeze(x, single), results)

        x = x.reshape(*rows, units * elements)
        x = lax.squeeze(x, [axis for axis in single if axis != len(rows)])
        operands = (x,) if before is None else (x, before)
        results = calls.not_inlined(inside)(*operands)
        return jax.tree.map(lambda x: lax.expand_dims(x, single), results)

    return call


def _decompress_call(twin: _Operation) -> _Operation:
    """`twins.decompress` as a call, which takes and gives no axes of size 1."""

    def call(*operands: Array) -> Any:
        *after, values, positions = operands
        single = _single(values)

        def inside(*operands: Array) -> Array:
            whole = twin(*(lax.expand_dims(x, single) for x in operands))
            return lax.squeeze(whole, single)

        late = calls.waiting(inside) if after else calls.not_inlined(inside)
        squeezed = (lax.squeeze(x, single) for x in (values, positions))
        return lax.expand_dims(late(*after, *squeezed), single)

    return call


def _single(x: Array) -> list[int]:
    """The axes of size 1, but for the last."""
    return [axis for axis, size in enumerate(x.shape[:-1]) if size == 1]


def _within_reach(plan: Plan, x: Array) -> bool:
    """Whether a kernel may be asked for here.

    Not for more than it can address. And not on a mesh where some axes are explicit, or
    manual, and others are not: a kernel would have to be told about both at once.
    """
    mesh = jax.sharding.get_abstract_mesh()
    alike = len(set(mesh.axis_types)) <= 1
    return alike and plans.fits(plan, math.prod(x.shape[:-1]))
