"""Prepares the training of a config on the available devices."""

import dataclasses

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from train import data
from train.config import config as config_lib
from train.config import validation
from train.config.config import ConfigError
from train.engine import mesh as mesh_lib
from train.engine import step as step_lib


@dataclasses.dataclass(frozen=True)
class Job:
    """A config with its dataset, mesh and abstract state.

    Attributes:
      config: the config.
      dataset: the opened dataset.
      mesh: the mesh of all devices of all processes.
      abstract: the state's `jax.ShapeDtypeStruct`s, which have shardings.
    """

    config: ConfigDict
    dataset: data.Dataset
    mesh: Mesh
    abstract: step_lib.State

    @property
    def shardings(self) -> step_lib.State:
        """The sharding of each array of the state."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)

    @property
    def state_bytes(self) -> int:
        """The bytes of one copy of the state."""
        return sum(
            leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.abstract)
        )


def check(config: ConfigDict) -> None:
    """Checks a config for the available devices, without reading examples.

    Raises:
      ConfigError: the config cannot be run.
      DataError: the description of the prepared dataset is damaged.
    """
    validation.validate(config, jax.device_count())
    if config.layers != "dropit" or config_lib.policy(config).fill != "mean":
        return
    # Tracing checks that every layer's input has enough positions for a mean.
    step, args = step_lib.abstract(config)
    try:
        jax.eval_shape(step, *args)
    except ValueError as error:
        raise ConfigError(f"config.dropit: {error}") from error


def prepare(config: ConfigDict) -> Job:
    """Returns the job of a config: checks the config, and opens the dataset.

    Raises:
      ConfigError: the config cannot be run.
      DataError: the dataset is not there, or damaged.
    """
    check(config)
    dataset = data.load(
        config.dataset, config.data_dir, config.image_size, config.augmentation
    )
    mesh = mesh_lib.create(config)
    return Job(config, dataset, mesh, abstract_state(config, mesh))


def abstract_state(config: ConfigDict, mesh: Mesh) -> step_lib.State:
    """Returns the shapes, dtypes and shardings of a config's state on a mesh."""
    abstract = step_lib.abstract_state(config)
    return mesh_lib.placed(abstract, mesh_lib.state_sharded(mesh, abstract))
