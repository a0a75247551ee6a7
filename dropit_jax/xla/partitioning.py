"""Runs functions that XLA cannot look into on each device's own part of sharded arrays.

XLA would gather their operands on every device. Here it is told which axes may be
sharded.
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

# A function of arrays with the same leading axes, which its results have too.
_Operation = Callable[..., Any]


def on_every_device(
    kernel: _Operation, results: int, *, elementwise: bool = False
) -> _Operation:
    """Returns a kernel that each device runs on its own part of the operands.

    Args:
      kernel: takes arrays of the same rank and leading axes, and returns arrays of this
        rank and these leading axes. It works along the last axis.
      results: how many arrays it returns.
      elementwise: whether the last axis may be sharded too; all arrays then have the
        same shape.
    """
    unsharded = 0 if elementwise else 1

    @custom_vmap
    def mapped(*operands: Array) -> Any:
        return _run_sharded(kernel, results, unsharded, operands)

    @mapped.def_vmap
    def _(size: int, batched: Sequence[bool], *operands: Array) -> Any:
        batched_operands = [
            x if has else jnp.broadcast_to(x, (size, *x.shape))
            for x, has in zip(operands, batched, strict=True)
        ]
        given = mapped(*batched_operands)
        return given, jax.tree.map(lambda _: True, given)

    return mapped


@custom_vmap
def any_element(x: Array) -> Array:
    """Returns an element of an array; each device takes one of its own part.

    The results on several devices may differ. `jax.vmap` gives one for the whole batch.
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


def _run_sharded(
    kernel: _Operation, results: int, unsharded: int, operands: tuple[Array, ...]
) -> Any:
    """Runs the kernel with the last `unsharded` axes whole on each device."""
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Manual in mesh.axis_types:
        return kernel(*operands)
    if AxisType.Explicit in mesh.axis_types:
        given = jax.typeof(operands[0]).sharding.spec
        spec = PartitionSpec(*given[: len(given) - unsharded], *[None] * unsharded)
        # Unchecked: the kernel computes each element from its own chunk, so that no
        # result is wrongly said to be equal on several devices.
        return jax.shard_map(kernel, in_specs=spec, out_specs=spec, check_vma=False)(
            *operands
        )
    return _partitioned(kernel, results, unsharded, operands)(*operands)


def _partitioned(
    kernel: _Operation, results: int, unsharded: int, operands: tuple[Array, ...]
) -> _Operation:
    """Returns the kernel with rules for XLA on how to shard its arrays.

    All arrays take the sharding of the first operand's leading axes; the last
    `unsharded` axes are whole on every device.
    """
    lead = operands[0].ndim - unsharded

    def leading_sharding(mesh: Any, shapes: Any) -> NamedSharding:
        spec = [*shapes[0].sharding.spec, *[None] * lead][:lead]
        return NamedSharding(mesh, PartitionSpec(*spec, *[None] * unsharded))

    def infer(mesh: Any, shapes: Any, result: Any) -> Any:
        return jax.tree.map(lambda _: leading_sharding(mesh, shapes), result)

    def partition(mesh: Any, shapes: Any, result: Any) -> Any:
        sharding = leading_sharding(mesh, shapes)
        of_results = jax.tree.map(lambda _: sharding, result)
        return mesh, kernel, of_results, (sharding,) * len(operands)

    names = (f"i{number}" for number in itertools.count())
    shared = " ".join(itertools.islice(names, lead))
    arrays = len(operands) + results
    last = list(itertools.islice(names, unsharded * arrays))
    axes = [f"{shared} {name}" for name in last] if unsharded else [shared] * arrays

    # `custom_partitioning` takes no function with keyword arguments.
    def positional(*operands: Array) -> Any:
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
