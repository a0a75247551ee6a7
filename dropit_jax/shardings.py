"""Explicit shardings (`jax.sharding.AxisType.Explicit`), where they matter to us.

In Auto mode and on one device every function here returns its argument: what XLA
shards is not known while tracing, and is XLA's to resolve.
"""

import math

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array


def spec(x: Array) -> tuple[str | tuple[str, ...] | None, ...]:
    """The mesh axes over which each axis of `x` is explicitly sharded."""
    return tuple(jax.typeof(x).sharding.spec)


def shards(x: Array, axis: int) -> int:
    """Over how many shards an axis of `x` is explicitly sharded."""
    names = spec(x)[axis]
    if names is None:
        return 1
    names = (names,) if isinstance(names, str) else names
    sizes = jax.typeof(x).sharding.mesh.shape
    return math.prod(sizes[name] for name in names)


def gather(x: Array, keep: int) -> Array:
    """`x` with all axes but the first `keep` on every device."""
    return _reshard(x, (*spec(x)[:keep], *[None] * (x.ndim - keep)))


def like(x: Array, template: Array) -> Array:
    """`x` sharded like an array of the same shape."""
    return _reshard(x, spec(template))


def _reshard(x: Array, wanted: tuple[str | tuple[str, ...] | None, ...]) -> Array:
    if spec(x) == wanted:
        return x
    return jax.sharding.reshard(x, PartitionSpec(*wanted))
