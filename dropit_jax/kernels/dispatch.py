"""Kernels where there is an NVIDIA GPU, their twins elsewhere.

XLA cannot look into a kernel, and would gather whatever it reads on every device; here
it is told that all axes but the last may be shared out. No kernel sees more than its
device's part.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from dropit_jax import inlining
from dropit_jax.kernels import plan as plans
from dropit_jax.kernels import twins
from dropit_jax.kernels.compress import compress as _compress
from dropit_jax.kernels.decompress import decompress as _decompress
from dropit_jax.kernels.lowering import when_lowered
from dropit_jax.kernels.plan import Plan
from dropit_jax.kernels.twins import Positions
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


def on_every_device(kernel: _Operation, results: int) -> _Operation:
    """A kernel, each device running it on the part of its operands that it holds.

    Args:
      kernel: takes arrays of the same rank and leading axes, and gives such arrays. It
        works along the last axis.
      results: how many it gives.
    """

    @custom_vmap
    def mapped(*operands: Array) -> Any:
        return _shared_out(kernel, results, operands)

    @mapped.def_vmap
    def _(size: int, batched: Sequence[bool], *operands: Array) -> Any:
        alike = [
            x if has else jnp.broadcast_to(x, (size, *x.shape))
            for x, has in zip(operands, batched, strict=True)
        ]
        given = mapped(*alike)
        return given, jax.tree.map(lambda _: True, given)

    return mapped


def _shared_out(kernel: _Operation, results: int, operands: tuple[Array, ...]) -> Any:
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Manual in mesh.axis_types:
        return kernel(*operands)
    if AxisType.Explicit in mesh.axis_types:
        spec = PartitionSpec(*jax.typeof(operands[0]).sharding.spec[:-1], None)
        # The kernel computes each element from its own chunk, so nothing is said to be
        # alike on several devices that is not.
        return jax.shard_map(kernel, in_specs=spec, out_specs=spec, check_vma=False)(
            *operands
        )
    return _partitioned(kernel, results, operands)(*operands)


def _partitioned(
    kernel: _Operation, results: int, operands: tuple[Array, ...]
) -> _Operation:
    """The kernel, and how XLA may share it out among devices."""
    lead = operands[0].ndim - 1

    def along_lead(mesh: Any, shapes: Any) -> NamedSharding:
        spec = [*shapes[0].sharding.spec, *[None] * lead][:lead]
        return NamedSharding(mesh, PartitionSpec(*spec, None))

    def infer(mesh: Any, shapes: Any, result: Any) -> Any:
        return jax.tree.map(lambda _: along_lead(mesh, shapes), result)

    def partition(mesh: Any, shapes: Any, result: Any) -> Any:
        sharding = along_lead(mesh, shapes)
        of_results = jax.tree.map(lambda _: sharding, result)
        return mesh, kernel, of_results, (sharding,) * len(operands)

    names = (f"i{number}" for number in itertools.count())
    shared = " ".join(itertools.islice(names, lead))
    last = list(itertools.islice(names, len(operands) + results))
    axes = [f"{shared} {name}" for name in last]

    def positional(*operands: Array) -> Any:  # it takes no function with keywords
        return kernel(*operands)

    partitioned = custom_partitioning(positional)
    partitioned.def_partition(
        partition=partition,
        infer_sharding_from_operands=infer,
        sharding_rule=f"{', '.join(axes[: len(operands)])} -> "
        f"{', '.join(axes[len(operands) :])}",
        need_replication_factors=tuple(last),
    )
    return partitioned
