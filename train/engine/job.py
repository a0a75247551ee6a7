"""What a config asks for, made ready for the devices that there are."""

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
    """A config, and what follows from it.

    Attributes:
      config: what is trained.
      dataset: what it is trained on.
      mesh: of all devices of all processes.
      abstract: the state's shapes, dtypes and shardings.
    """

    config: ConfigDict
    dataset: data.Dataset
    mesh: Mesh
    abstract: step_lib.State

    @property
    def shardings(self) -> step_lib.State:
        """Where each array of the state is."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)

    @property
    def state_bytes(self) -> int:
        """Size of one copy of the state."""
        return sum(
            leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.abstract)
        )


def check(config: ConfigDict) -> None:
    """Checks a config for the devices that there are, before anything is read.

    Raises:
      ConfigError: the config cannot be run.
    """
    validation.validate(config, jax.device_count())
    if config.layers != "dropit" or config_lib.policy(config).fill != "mean":
        return
    # Whether there are enough positions for a mean depends on every layer's input.
    step, args = step_lib.abstract(config)
    try:
        jax.eval_shape(step, *args)
    except ValueError as error:
        raise ConfigError(f"config.dropit: {error}") from error


def prepare(config: ConfigDict) -> Job:
    """Checks a config and opens its dataset; nothing is computed yet.

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
    """The shapes, dtypes and shardings of a config's state on a mesh."""
    abstract = step_lib.abstract_state(config)
    return mesh_lib.placed(abstract, mesh_lib.state_sharded(mesh, abstract))
