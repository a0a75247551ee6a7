"""Kernels where there is an NVIDIA GPU, their twins elsewhere."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dropit_jax import inlining
from dropit_jax.kernels import plan as plans
from dropit_jax.kernels import twins
from dropit_jax.kernels.compress import compress as _compress
from dropit_jax.kernels.decompress import decompress as _decompress
from dropit_jax.kernels.lowering import when_lowered
from dropit_jax.kernels.plan import Plan
from dropit_jax.kernels.twins import Positions
from dropit_jax.partitioning import on_every_device
from dropit_jax.platforms import by_platform

# On arrays of the same leading axes; the results have them too.
_Operation = Callable[..., Any]


# JAX keeps what it has traced: layers of one shape are traced once, not each.
@functools.partial(jax.jit, static_argnames="plan")
def compress(
    x: Float[Array, "*rows units elements"], plan: Plan
) -> tuple[Float[Array, "*rows units kept"], Positions]:
    """`twins.compress`, in one pass where there is a kernel for it.

    It has no gradient: what is kept is what a gradient is computed from.
    """
    kernel = when_lowered(
        functools.partial(_compress, plan=plan),
        (plan.unit * plan.kept, plan.value_dtype),
        (plan.positions, plan.position_dtype),
    )
    twin = functools.partial(twins.compress, plan=plan)
    x = lax.stop_gradient(x)
    if not _within_reach(plan, x):
        return twin(x)
    operation = by_platform(
        twin, cpu=_as_call(twin), cuda=on_every_device(kernel, results=2)
    )
    return operation(x)


@functools.partial(jax.jit, static_argnames=("plan", "dtype"))
def decompress(
    values: Float[Array, "*rows units kept"],
    positions: Positions,
    plan: Plan,
    dtype: jax.typing.DTypeLike,
) -> Float[Array, "*rows units elements"]:
    """`twins.decompress`, in one pass where there is a kernel for it."""
    return _decompress_differentiably(plan, jnp.dtype(dtype), values, positions)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _decompress_differentiably(
    plan: Plan, dtype: jnp.dtype, values: Array, positions: Array
) -> Array:
    kernel = when_lowered(
        functools.partial(_decompress, plan=plan, dtype=dtype),
        (plan.unit * plan.size, dtype),
    )
    twin = functools.partial(twins.decompress, plan=plan, dtype=dtype)
    if not _within_reach(plan, values):
        return twin(values, positions)
    operation = by_platform(twin, cuda=on_every_device(kernel, results=1))
    return operation(values, positions)


def _decompress_forward(
    plan: Plan, dtype: jnp.dtype, values: Array, positions: Array
) -> tuple[Array, Any]:
    # A kernel has no gradient, and neither have the bits that its twin works on.
    def placed(values: Array) -> Array:
        return twins.placed(values.astype(dtype), positions, plan)

    _, pullback = jax.vjp(placed, values)
    return _decompress_differentiably(plan, dtype, values, positions), pullback


def _decompress_backward(
    plan: Plan, dtype: jnp.dtype, pullback: Any, cotangent: Array
) -> tuple[Array, None]:
    del plan, dtype
    return (*pullback(cotangent), None)


_decompress_differentiably.defvjp(_decompress_forward, _decompress_backward)


def _as_call(twin: _Operation) -> _Operation:
    """`twins.compress` as a call, which takes and gives no axes of size 1.

    XLA would copy what has some into another layout, and back.
    """

    def call(x: Array) -> tuple[Array, ...]:
        single = [axis for axis, size in enumerate(x.shape[:-1]) if size == 1]

        def inside(x: Array) -> list[Array]:
            results = twin(lax.expand_dims(x, single))
            return [lax.squeeze(result, single) for result in results]

        results = inlining.not_inlined(inside)(lax.squeeze(x, single))
        return tuple(lax.expand_dims(result, single) for result in results)

    return call


def _within_reach(plan: Plan, x: Array) -> bool:
    """Whether a kernel may be asked for here.

    Not for more than it can address. And not on a mesh where some axes are explicit, or
    manual, and others are not: a kernel would have to be told about both at once.
    """
    mesh = jax.sharding.get_abstract_mesh()
    alike = len(set(mesh.axis_types)) <= 1
    return alike and plans.fits(plan, math.prod(x.shape[:-1]))
