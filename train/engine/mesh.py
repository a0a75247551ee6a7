"""The mesh of all devices, and the shardings of states and batches on it.

The mesh has two axes, and a batch is split over both. Along "data" every device has its
own copy of the state. Along "fsdp" the devices share one copy (fully sharded data
parallel: Rajbhandari et al., 2020, "ZeRO", stage 3).
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from train.config import mesh_axes

_DATA, _FSDP = "data", "fsdp"


def create(config: ConfigDict) -> Mesh:
    """Returns the mesh of all devices of all processes, with axes "data" and "fsdp".

    Raises:
      ValueError: the product of the axes' sizes is not the number of devices.
    """
    devices = np.asarray(jax.devices())
    sizes = mesh_axes.sizes(config.mesh.data, config.mesh.fsdp, devices.size)
    return Mesh(devices.reshape(sizes), (_DATA, _FSDP))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding with a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: the first axis is split over all devices."""
    return NamedSharding(mesh, PartitionSpec((_DATA, _FSDP)))


def state_sharded(mesh: Mesh, state: Any) -> Any:
    """Returns the shardings of a state, split over the mesh axis "fsdp".

    Each array is split along its largest axis that can be split evenly. An array
    without such an axis is replicated. On 4 devices along "fsdp", (3, 3, 64, 128) is
    split into (3, 3, 64, 32), and (10,) is replicated.

    Args:
      mesh: the mesh.
      state: a pytree of arrays, or of their shapes.
    """
    size = mesh.shape[_FSDP]

    def sharding(leaf: Any) -> NamedSharding:
        fitting = [axis for axis, n in enumerate(leaf.shape) if n % size == 0]
        if size == 1 or not fitting:
            return replicated(mesh)
        largest = max(fitting, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * largest, _FSDP))

    return jax.tree.map(sharding, state)


def placed(abstract: Any, shardings: Any) -> Any:
    """Returns `jax.ShapeDtypeStruct`s with shardings for a pytree of shapes."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        abstract,
        shardings,
    )


def placer(mesh: Mesh) -> Callable[[Any], Any]:
    """Returns a function that puts this process's part of a batch onto its devices."""
    sharding = batch_sharded(mesh)

    def place(rows: Any) -> Any:
        return jax.tree.map(
            lambda array: jax.make_array_from_process_local_data(sharding, array), rows
        )

    return place


def compile_training(step: Callable[..., Any], mesh: Mesh, shardings: Any) -> Any:
    """Returns a jitted training step for a mesh, which donates the state.

    Args:
      step: a function of a state and a batch; returns a state and sums.
      mesh: the mesh.
      shardings: the shardings of the state, before and after the step.
    """
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, batch_sharded(mesh)),
        out_shardings=(shardings, replicated(mesh)),
    )


def compile_evaluation(step: Callable[..., Any], mesh: Mesh, shardings: Any) -> Any:
    """Returns a jitted evaluation step for a mesh.

    Args:
      step: a function of a state and a batch; returns sums.
      mesh: the mesh.
      shardings: the shardings of the state.
    """
    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharded(mesh)),
        out_shardings=replicated(mesh),
    )
