"""What a config costs: bytes cached, bytes allocated on a GPU, time of a step here."""

import copy
import time
from collections.abc import Mapping

import jax
from ml_collections import ConfigDict

from dropit_jax import memory
from train import config as config_lib
from train import data
from train import mesh as mesh_lib
from train import step as step_lib

_TIMED_STEPS = 8


def temp_bytes(config: ConfigDict, target: str) -> int:
    """What a step allocates beside arguments and results on the target."""
    step, args = step_lib.abstract(config)
    return memory.compile_report(step, *args, target=target, donate=0).temp_bytes


def cached_bytes(config: ConfigDict) -> int:
    """What DropIT layers cache in a step; of plain Flax, the same layers' inputs."""
    if config.memory == "baseline":
        # With nothing dropped, a DropIT layer caches what the Flax layer does.
        config = copy.deepcopy(config)
        config.memory = "dropit"
        config.dropit = config_lib.dropit_section(rate=0.0, value_dtype=None)
    step, args = step_lib.abstract(config)
    return memory.cached_bytes(step, *args)


def step_seconds(
    variants: Mapping[str, ConfigDict], rounds: int = _TIMED_STEPS
) -> dict[str, list[float]]:
    """Times of a training step of each variant, taken in turns."""
    states, steps, batches = {}, {}, {}
    for name, config in variants.items():
        mesh = mesh_lib.create(config)
        shardings = mesh_lib.state_sharded(mesh, step_lib.abstract_state(config))
        states[name] = step_lib.initialise(config, shardings)
        step = step_lib.train_step(config)
        steps[name] = mesh_lib.compile_training(step, mesh, shardings)
        batches[name] = mesh_lib.placer(mesh)(_first_batch(config))
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(1 + rounds):
        for name in variants:
            start = time.perf_counter()
            states[name], sums = steps[name](states[name], batches[name])
            jax.block_until_ready((states[name], sums))
            times[name].append(time.perf_counter() - start)
    # The first step of each compiles.
    return {name: taken[1:] for name, taken in times.items()}


def _first_batch(config: ConfigDict) -> data.Batch:
    dataset = data.load(
        config.dataset, config.data_dir, config.image_size, config.augmentation
    )
    return data.first_batch(dataset, config.batch_size, config.seed)
