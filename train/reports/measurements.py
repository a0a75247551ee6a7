"""What a config costs: bytes cached, bytes allocated on a GPU, time of a step here."""

import copy
import dataclasses
import math
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dropit_jax import DropIT, LayerPreset, compress, linen, memory
from train import data
from train.config import config as config_lib
from train.engine import job as job_lib
from train.engine import mesh as mesh_lib
from train.engine import step as step_lib

_TIMED_STEPS = 8


def allocated(config: ConfigDict, target: str) -> memory.CompileReport:
    """What a step of a config takes on the target."""
    step, args = step_lib.abstract(config)
    return memory.compile_report(step, *args, target=target, donate=0)


def cached_bytes(config: ConfigDict) -> int | None:
    """What DropIT layers cache in a step; of plain Flax, the same layers' inputs.

    `None` of a loss under `drop`, which decides by itself what becomes of these.
    """
    if config.drop:
        return None
    if config.memory == "baseline":
        # With nothing dropped, a DropIT layer caches what the Flax layer does.
        config = copy.deepcopy(config)
        config.memory = "dropit"
        config.dropit = config_lib.dropit_section(rate=0.0, value_dtype=None)
    step, args = step_lib.abstract(config)
    return memory.cached_bytes(step, *args)


def dropped(config: ConfigDict) -> float:
    """The share of elements that a step drops, of all that its layers cache.

    It is more than the rate where rounding down, or a chunk of few elements, makes it
    so: of 16 elements one is kept at any rate from 0.875 on.
    """
    preset = config_lib.memory(config)
    if preset.dropit is None or preset.conv is None:
        return 0.0
    plain = config_lib.plain(config)
    if "scan" in plain.model:
        plain.model.scan = False  # or one block would stand for all
    model, state = step_lib.create_model(plain), step_lib.abstract_state(plain)
    images = step_lib.abstract_images(config, config.batch_size)
    # What is filled in does not matter here, and would not suit the head.
    layers = LayerPreset("", preset.dropit, preset.conv).for_vectors
    with linen.intercept(layers) as found:
        jax.eval_shape(
            lambda variables, images: model.apply(variables, images, train=False),
            state.variables,
            images,
        )
    kept = every = 0
    for layer in found.layers:
        if layer.shared_with is None:
            is_convolution = layer.kind.startswith("Conv")
            policy = preset.conv if is_convolution else preset.dropit
            kept += kept_elements(layer.shape, policy)
            every += math.prod(layer.shape)
    return 1 - kept / every


def kept_elements(shape: tuple[int, ...], policy: DropIT) -> int:
    """How many elements a policy keeps of an activation of this shape."""
    # What is stored of a float is the float.
    policy = dataclasses.replace(
        policy, value_dtype=None, rounding="nearest", fill="zero"
    )
    residual = jax.eval_shape(
        lambda x, key: compress(x, policy, key),
        jax.ShapeDtypeStruct(shape, jnp.float32),
        jax.random.key(0),
    )
    return math.prod(residual.values.shape)


def step_seconds(
    variants: Mapping[str, ConfigDict], rounds: int = _TIMED_STEPS
) -> dict[str, list[float]]:
    """Times of a training step of each variant, taken in turns."""
    jobs = {name: job_lib.prepare(config) for name, config in variants.items()}
    states, steps, batches = {}, {}, {}
    for name, job in jobs.items():
        states[name] = step_lib.initialise(job.config, job.shardings)
        step = step_lib.train_step(job.config)
        steps[name] = mesh_lib.compile_training(step, job.mesh, job.shardings)
        batch = data.first_batch(job.dataset, job.config.batch_size, job.config.seed)
        batches[name] = mesh_lib.placer(job.mesh)(batch)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(1 + rounds):
        for name in variants:
            start = time.perf_counter()
            states[name], sums = steps[name](states[name], batches[name])
            jax.block_until_ready((states[name], sums))
            times[name].append(time.perf_counter() - start)
    # The first step of each compiles.
    return {name: taken[1:] for name, taken in times.items()}
