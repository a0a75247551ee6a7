"""Functions that XLA cannot look into, shared out among devices.

XLA would gather whatever they read on every device; here it is told which axes may be
shared out. No function sees more than its device's part.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

from dropit_jax.compat import custom_partitioning

# On arrays of the same leading axes; the results have them too.
_Operation = Callable[..., Any]


def on_every_device(
    kernel: _Operation, results: int, *, elementwise: bool = False
) -> _Operation:
    """A kernel, each device running it on the part of its operands that it holds.

    Args:
      kernel: takes arrays of the same rank and leading axes, and gives such arrays. It
        works along the last axis.
      results: how many it gives.
      elementwise: whether the last axis may be shared out too; all arrays have one
        shape then.
    """
    whole = 0 if elementwise else 1

    @custom_vmap
    def mapped(*operands: Array) -> Any:
        return _shared_out(kernel, results, whole, operands)

    @mapped.def_vmap
    def _(size: int, batched: Sequence[bool], *operands: Array) -> Any:
        alike = [
            x if has else jnp.broadcast_to(x, (size, *x.shape))
            for x, has in zip(operands, batched, strict=True)
        ]
        given = mapped(*alike)
        return given, jax.tree.map(lambda _: True, given)

    return mapped


@custom_vmap
def any_element(x: Array) -> Array:
    """An element of an array, each device taking one of its own part of it.

    Where there is more than one, the result is not the same on all of them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Manual in mesh.axis_types:
        return _first(x)
    if AxisType.Explicit in mesh.axis_types:
        given, none = jax.typeof(x).sharding.spec, PartitionSpec()
        return jax.shard_map(_first, in_specs=given, out_specs=none, check_vma=False)(x)
    partitioned = custom_partitioning(_first)
    partitioned.def_partition(
        partition=_first_of_part,
        infer_sharding_from_operands=lambda mesh, *_: _replicated(mesh),
        sharding_rule=f"{' '.join(f'i{axis}' for axis in range(x.ndim))} -> ",
    )
    return partitioned(x)


@any_element.def_vmap
def _(size: int, batched: Sequence[bool], x: Array) -> tuple[Array, bool]:
    del size, batched
    return any_element(x), False


def _first(x: Array) -> Array:
    return lax.slice(x, (0,) * x.ndim, (1,) * x.ndim).reshape(())


def _first_of_part(mesh: Any, shapes: Any, result: Any) -> Any:
    del result
    return mesh, _first, _replicated(mesh), (shapes[0].sharding,)


def _replicated(mesh: Any) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _shared_out(
    kernel: _Operation, results: int, whole: int, operands: tuple[Array, ...]
) -> Any:
    """The results, where the last `whole` axes are not shared out."""
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Manual in mesh.axis_types:
        return kernel(*operands)
    if AxisType.Explicit in mesh.axis_types:
        given = jax.typeof(operands[0]).sharding.spec
        spec = PartitionSpec(*given[: len(given) - whole], *[None] * whole)
        # The kernel computes each element from its own chunk, so nothing is said to be
        # alike on several devices that is not.
        return jax.shard_map(kernel, in_specs=spec, out_specs=spec, check_vma=False)(
            *operands
        )
    return _partitioned(kernel, results, whole, operands)(*operands)


def _partitioned(
    kernel: _Operation, results: int, whole: int, operands: tuple[Array, ...]
) -> _Operation:
    """The kernel, and how XLA may share it out among devices."""
    lead = operands[0].ndim - whole

    def along_lead(mesh: Any, shapes: Any) -> NamedSharding:
        spec = [*shapes[0].sharding.spec, *[None] * lead][:lead]
        return NamedSharding(mesh, PartitionSpec(*spec, *[None] * whole))

    def infer(mesh: Any, shapes: Any, result: Any) -> Any:
        return jax.tree.map(lambda _: along_lead(mesh, shapes), result)

    def partition(mesh: Any, shapes: Any, result: Any) -> Any:
        sharding = along_lead(mesh, shapes)
        of_results = jax.tree.map(lambda _: sharding, result)
        return mesh, kernel, of_results, (sharding,) * len(operands)

    names = (f"i{number}" for number in itertools.count())
    shared = " ".join(itertools.islice(names, lead))
    arrays = len(operands) + results
    last = list(itertools.islice(names, whole * arrays))
    axes = [f"{shared} {name}" for name in last] if whole else [shared] * arrays

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
