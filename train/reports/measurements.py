"""Measures a config: bytes stored, bytes allocated on a GPU, time of a step here."""

import time
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from dropit_jax import memory
from train import data
from train.config import config as config_lib
from train.engine import job as job_lib
from train.engine import mesh as mesh_lib
from train.engine import step as step_lib

_TIMED_STEPS = 8


def allocated(config: ConfigDict, target: str) -> memory.CompileReport:
    """Returns the report on a training step of a config, compiled for a target."""
    step, args = step_lib.abstract(config)
    return memory.compile_report(step, *args, target=target, donate=0)


def stored_bytes(config: ConfigDict) -> int:
    """Returns the bytes that a step stores between its forward and backward pass.

    With `config.accumulate_steps` there is such a pass for each part of the batch.
    """
    part = config.batch_size // config.accumulate_steps
    _, (state, batch) = step_lib.abstract(config, part)

    def loss(params: Any, *others: Any) -> jax.Array:
        # Only the parameters are differentiated, as in a training step.
        batch_stats, batch, rng = jax.lax.stop_gradient(others)
        key = jax.random.wrap_key_data(rng)
        return step_lib.loss(config)(params, batch_stats, batch, key)[0]

    args = state.params, state.batch_stats, batch, state.rng
    return memory.saved_residuals(loss, *args).total_bytes


def dropped(config: ConfigDict) -> float:
    """Returns the fraction of a chunk that a step drops; 0 without a policy.

    It differs from the rate if the rate does not drop a whole number of elements: at
    the rate 0.9, one of 16 elements is kept, and the fraction is 0.9375. Without
    chunks, or for whole channels, the rate is returned.
    """
    if not config_lib.uses_policy(config):
        return 0.0
    policy = config_lib.policy(config)
    if policy.granularity == "channel" or policy.chunk_size is None:
        return policy.rate
    return 1 - policy.kept(policy.chunk_size) / policy.chunk_size


def step_seconds(
    variants: Mapping[str, ConfigDict], rounds: int = _TIMED_STEPS
) -> dict[str, list[float]]:
    """Returns the times of each variant's training steps, in seconds.

    The variants take turns. The first step of each, which is compiled, is left out. For
    `rounds=2`: `{"flax": [0.31, 0.30], ...}`.

    Args:
      variants: the configs, by name.
      rounds: the number of timed steps of each variant.
    """
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
    # Without the first step of each, which includes the compilation.
    return {name: taken[1:] for name, taken in times.items()}
