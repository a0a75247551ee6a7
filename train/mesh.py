"""Where arrays live: the mesh of all local devices, and the shardings on it."""

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
