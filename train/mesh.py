"""Where arrays live: the mesh of all local devices, and the shardings on it."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

_BATCH_AXIS = "data"


def create() -> Mesh:
    """A mesh of all local devices along the batch."""
    devices = jax.local_devices()
    return jax.make_mesh(
        (len(devices),), (_BATCH_AXIS,), axis_types=(AxisType.Auto,), devices=devices
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device: parameters and optimiser state."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """The leading axis split over the devices: batches."""
    return NamedSharding(mesh, PartitionSpec(_BATCH_AXIS))


def parallel(
    step: Callable[..., Any], mesh: Mesh, *, donate_state: bool = False
) -> Callable[..., Any]:
    """A step of state and batch, compiled for a mesh.

    Each device has the whole state and takes its part of the batch.
    """
    return jax.jit(
        step,
        donate_argnums=0 if donate_state else (),
        in_shardings=(replicated(mesh), batch_sharded(mesh)),
        out_shardings=replicated(mesh),
    )
