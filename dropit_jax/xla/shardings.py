"""Shardings, where they matter to us.

Explicit ones (`jax.sharding.AxisType.Explicit`) are known while tracing; `spec`,
`shards`, `gather`, `like` and `to` are about these, and elsewhere do nothing. All
others XLA resolves; `join` tells it which arrays to shard alike, and `whole_rows` what
not to.
"""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

from dropit_jax import compat
from dropit_jax.compat import Primitive, ad, batching, mlir, sdy

Spec = tuple[str | tuple[str, ...] | None, ...]


def spec(x: Array) -> Spec:
    """The mesh axes over which each axis of `x` is explicitly sharded."""
    return tuple(jax.typeof(x).sharding.spec)


def shards(x: Array, axis: int) -> int:
    """Over how many shards an axis of `x` is explicitly sharded."""
    return shards_of(jax.typeof(x), axis)


def shards_of(aval: Any, axis: int) -> int:
    """Over how many shards an axis of arrays of a type is explicitly sharded."""
    sharding = getattr(aval, "sharding", None)
    if sharding is None or not aval.shape:
        return 1
    names = tuple(sharding.spec)[axis]
    if names is None:
        return 1
    names = (names,) if isinstance(names, str) else names
    return math.prod(sharding.mesh.shape[name] for name in names)


def gather(x: Array, keep: int) -> Array:
    """`x` with all axes but the first `keep` on every device."""
    return to(x, (*spec(x)[:keep], *[None] * (x.ndim - keep)))


def like(x: Array, template: Array) -> Array:
    """`x` sharded like an array of the same shape."""
    return to(x, spec(template))


def to(x: Array, wanted: Spec) -> Array:
    """`x` with an explicit sharding."""
    if spec(x) == wanted:
        return x
    return jax.sharding.reshard(x, PartitionSpec(*wanted))


def varying_alike(arrays: Any, like: Any) -> Any:
    """Arrays, as what differs from device to device wherever others do.

    Within `jax.shard_map`: what a backward rule gives for them does then, too.

    Args:
      arrays: a pytree; what is no floating-point array in it stays as it is.
      like: a pytree.
    """
    axes: frozenset[str] = frozenset().union(*map(_varying_axes, jax.tree.leaves(like)))

    def vary(x: Any) -> Any:
        more = axes - _varying_axes(x)
        if not more or not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            return x
        return jax.lax.pcast(x, tuple(more), to="varying")

    return jax.tree.map(vary, arrays)


def _varying_axes(x: Any) -> frozenset[str]:
    aval = jax.typeof(x)
    return (
        aval.manual_axis_type.varying
        if hasattr(aval, "manual_axis_type")
        else frozenset()
    )


def whole_rows(x: Array) -> Array:
    """`x` with its last axis on every device, where XLA would choose how to shard it.

    It takes a mesh that is set (`jax.set_mesh`); elsewhere it is `x`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Auto not in mesh.axis_types:
        return x
    free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*free, None))


_groups = itertools.count()


def new_group() -> int:
    """A group of arrays that are sharded alike."""
    return next(_groups)


def join(x: Array, group: int) -> Array:
    """`x`, as a member of a group; in the compiled program it is `x` itself.

    XLA shards what it is free to shard by what comes before and after. Between an
    activation and its residual the one may not reach as far as the other, and what is
    rebuilt from the residual would be sharded by the gradient, not by the activation:
    moved from device to device, and all that is multiplied with it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not (mesh.empty or AxisType.Auto in mesh.axis_types):
        return x  # nothing is for XLA to choose
    joined: Array = _join_p.bind(x, group=group)
    return joined


_join_p = Primitive("join_sharding_group")
_join_p.def_impl(lambda x, **_: x)
_join_p.def_abstract_eval(lambda x, **_: x)
ad.deflinear2(_join_p, lambda cotangent, *_, **__: [cotangent])


def _batched(operands: Any, axes: Any, *, group: int) -> tuple[Array, int]:
    # All members must agree on where the batch is.
    return join(jnp.moveaxis(operands[0], axes[0], 0), group), 0


class _Numbers(dict[int, int]):
    """The numbers that the groups of a module have in it.

    They are counted in each module anew, so that its text is the same whatever was
    traced before.
    """


# Far from the numbers that JAX gives the groups of `jax.experimental.shard_alike`.
_FIRST = 1 << 40


def _lowered(context: Any, x: Any, *, group: int) -> list[Any]:
    # On one device XLA would take the groups out again, in passes of their own.
    if compat.num_devices(context) != 1:
        numbers = compat.of_module(context, _Numbers)
        sdy.sharding_group(x, numbers.setdefault(group, _FIRST + len(numbers)))
    return [x]


batching.primitive_batchers[_join_p] = _batched
mlir.register_lowering(_join_p, _lowered)
