"""Where arrays live: the mesh of all devices, and the shardings on it.

The mesh has two axes. A batch is split over both. Along "data" every device has its
own copy of the state; along "fsdp" the devices share one (fully sharded data parallel:
Rajbhandari et al., 2020, "ZeRO", stage 3).
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
    """The mesh of all devices of all processes.

    Raises:
      ValueError: the axes do not take all devices.
    """
    devices = np.asarray(jax.devices())
    sizes = mesh_axes.sizes(config.mesh.data, config.mesh.fsdp, devices.size)
    return Mesh(devices.reshape(sizes), (_DATA, _FSDP))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """The leading axis split over all devices: batches."""
    return NamedSharding(mesh, PartitionSpec((_DATA, _FSDP)))


def state_sharded(mesh: Mesh, state: Any) -> Any:
    """Shardings for arrays, or their shapes, of which devices along "fsdp" share one.

    Each array is split along its largest axis that can be split evenly; one that has
    none is replicated.
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
    """Shapes and dtypes, with where the arrays are to be."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        abstract,
        shardings,
    )


def placer(mesh: Mesh) -> Callable[[Any], Any]:
    """The function that puts this process's rows of a batch onto its devices."""
    sharding = batch_sharded(mesh)

    def place(rows: Any) -> Any:
        return jax.tree.map(
            lambda array: jax.make_array_from_process_local_data(sharding, array), rows
        )

    return place


def compile_training(step: Callable[..., Any], mesh: Mesh, shardings: Any) -> Any:
    """A step from state and batch to state and sums, for a mesh; the state is donated.

    Args:
      step: the function.
      mesh: what it runs on.
      shardings: of the state, which stay.
    """
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, batch_sharded(mesh)),
        out_shardings=(shardings, replicated(mesh)),
    )


def compile_evaluation(step: Callable[..., Any], mesh: Mesh, shardings: Any) -> Any:
    """A step from state and batch to sums, for a mesh, likewise."""
    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharded(mesh)),
        out_shardings=replicated(mesh),
    )
