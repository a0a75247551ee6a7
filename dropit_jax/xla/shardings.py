"""Reads and sets explicit shardings, and constrains the shardings that XLA chooses.

Explicit shardings (`jax.sharding.AxisType.Explicit`) are known while tracing.
`explicit_spec`, `shards`, `gather`, `reshard_like` and `reshard` are for these, and
ignore all others. XLA chooses the others: `join_group` makes it shard arrays alike, and
`whole_rows` makes it leave an axis unsharded.
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


def explicit_spec(x: Array) -> Spec:
    """Returns the mesh axes over which each axis of `x` is explicitly sharded."""
    return tuple(jax.typeof(x).sharding.spec)


def shards(x: Array, axis: int) -> int:
    """Returns the number of explicit shards of an axis of `x`; 1 if it has none."""
    return shards_of(jax.typeof(x), axis)


def shards_of(aval: Any, axis: int) -> int:
    """Returns the number of explicit shards of an axis of an array type."""
    sharding = getattr(aval, "sharding", None)
    if sharding is None or not aval.shape:
        return 1
    names = tuple(sharding.spec)[axis]
    if names is None:
        return 1
    names = (names,) if isinstance(names, str) else names
    return math.prod(sharding.mesh.shape[name] for name in names)


def gather(x: Array, keep: int) -> Array:
    """Returns `x` with all axes but the first `keep` whole on every device."""
    return reshard(x, (*explicit_spec(x)[:keep], *[None] * (x.ndim - keep)))


def reshard_like(x: Array, template: Array) -> Array:
    """Returns `x` with the explicit sharding of an array of the same shape."""
    return reshard(x, explicit_spec(template))


def reshard(x: Array, wanted: Spec) -> Array:
    """Returns `x` with an explicit sharding."""
    if explicit_spec(x) == wanted:
        return x
    return jax.sharding.reshard(x, PartitionSpec(*wanted))


def whole_rows(x: Array) -> Array:
    """Returns `x`, with a constraint that XLA does not shard its last axis.

    Returns `x` unchanged unless a mesh with `Auto` axes is set (`jax.set_mesh`).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Auto not in mesh.axis_types:
        return x
    free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*free, None))


_groups = itertools.count()


def new_group() -> int:
    """Returns a new group of arrays to shard alike."""
    return next(_groups)


def join_group(x: Array, group: int) -> Array:
    """Returns `x` as a member of a group, whose arrays XLA shards alike.

    The group adds no operation to the compiled program. XLA chooses shardings by
    propagation from the operations before and after. Propagation may not reach from an
    activation to its residual. Then XLA shards the decompressed array like the
    gradient, not like the activation, and moves the array and the other factor of its
    product between devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not (mesh.empty or AxisType.Auto in mesh.axis_types):
        return x  # XLA chooses no sharding
    joined: Array = _join_p.bind(x, group=group)
    return joined


_join_p = Primitive("join_sharding_group")
_join_p.def_impl(lambda x, **_: x)
_join_p.def_abstract_eval(lambda x, **_: x)
ad.deflinear2(_join_p, lambda cotangent, *_, **__: [cotangent])


def _batched(operands: Any, axes: Any, *, group: int) -> tuple[Array, int]:
    # All members must have the batch axis in the same place.
    return join_group(jnp.moveaxis(operands[0], axes[0], 0), group), 0


class _GroupNumbers(dict[int, int]):
    """The numbers of the groups in one lowered module, by the number in `new_group`.

    Each module counts from the start, so that its text is the same whatever was traced
    before.
    """


# Far from the numbers of the groups of `jax.experimental.shard_alike`.
_FIRST_NUMBER = 1 << 40


def _lowered(context: Any, x: Any, *, group: int) -> list[Any]:
    # On one device XLA would only remove the groups again, in additional passes.
    if compat.num_devices(context) != 1:
        numbers = compat.of_module(context, _GroupNumbers)
        sdy.sharding_group(x, numbers.setdefault(group, _FIRST_NUMBER + len(numbers)))
    return [x]


batching.primitive_batchers[_join_p] = _batched
mlir.register_lowering(_join_p, _lowered)
