"""The memory and the collectives of a training step whose batch is sharded.

Steps are compiled and not run, so that the devices may be simulated.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.interpreters import partial_eval
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.workloads.image_models import Workload
from benchmarks.workloads.sweeps import VARIANTS
from benchmarks.workloads.variants import TIMED_VARIANTS
from dropit_jax import memory

DEVICES = (1, 2, 4, 8)
_BATCH_PER_DEVICE = 8
_COLLECTIVE = re.compile(
    r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)


@dataclasses.dataclass(frozen=True)
class OnDevices:
    """Memory and collectives of a step on several devices.

    Attributes:
      kind: "devices".
      devices: the number of devices.
      variant: the variant's name, a way to save memory.
      batch_per_device: images on each device.
      collectives: the number of collectives in the compiled step, by kind.
      residual_bytes: bytes of the residuals on one device, with the parameters among
        them, but not constants.
      temp_bytes: temporary bytes of the compiled step on one device.
    """

    kind: str
    devices: int
    variant: str
    batch_per_device: int
    collectives: dict[str, int]
    residual_bytes: int
    temp_bytes: int


def on_devices(
    workload: Workload, variant: str, count: int, batch_per_device: int
) -> OnDevices:
    """Compiles a step for `count` devices and returns its memory and collectives."""
    mesh = jax.make_mesh(
        (count,), ("data",), (AxisType.Auto,), devices=jax.devices()[:count]
    )
    replicated, sharded = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    how = TIMED_VARIANTS[variant]
    batch = count * batch_per_device
    step, arguments, _ = workload.training_step(how, batch)
    jitted = jax.jit(
        step,
        in_shardings=(replicated, replicated, sharded, sharded),
        out_shardings=replicated,
    )
    compiled = jitted.lower(*arguments).compile()
    variables, _, images, labels = arguments
    backward = functools.partial(_backward, workload.loss(how))
    return OnDevices(
        "devices",
        count,
        variant,
        batch_per_device,
        collectives(compiled.as_text() or ""),
        bytes_a_device(
            backward, (variables, images, labels), (replicated, sharded, sharded)
        ),
        memory.memory_stats(compiled)["temp_bytes"],
    )


def _backward(loss: Any, variables: Any, images: jax.Array, labels: jax.Array) -> Any:
    """Returns a loss's backward pass, a pytree whose leaves are the residuals."""
    others = {name: each for name, each in variables.items() if name != "params"}

    def forward(params: Any) -> Any:
        return loss(params, others, images, labels)[0]

    return jax.vjp(forward, variables["params"])[1]


def collectives(program: str) -> dict[str, int]:
    """Returns the number of collectives in a compiled program, by kind."""
    return dict(sorted(collections.Counter(_COLLECTIVE.findall(program)).items()))


def bytes_a_device(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    shardings: Sequence[NamedSharding],
) -> int:
    """Returns the bytes of a function's results on one device, as XLA shards them.

    Results that depend on no argument, such as zeros, do not count: within a larger
    program they are constants, which take no memory.

    Args:
      function: a function of arrays; it is not run.
      arguments: arrays or `jax.ShapeDtypeStruct`s.
      shardings: the sharding of each argument.
    """
    jitted = jax.jit(function, in_shardings=tuple(shardings))
    results = jax.tree.leaves(jitted.lower(*arguments).compile().out_info)
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, counts in zip(
            results, _depend_on_arguments(function, arguments), strict=True
        )
        if counts
    )


def _depend_on_arguments(
    function: Callable[..., Any], arguments: Sequence[Any]
) -> list[bool]:
    """Returns, for each result, whether it depends on any argument."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    count = len(jaxpr.outvars)
    inputs = (
        partial_eval.dce_jaxpr(jaxpr, [i == result for i in range(count)])[1]
        for result in range(count)
    )
    return [any(used) for used in inputs]


def measure_devices(
    workload: Workload,
    counts: Sequence[int] = DEVICES,
    batch_per_device: int = _BATCH_PER_DEVICE,
) -> list[OnDevices]:
    """Returns the results of every variant on every number of devices."""
    return [
        on_devices(workload, variant, count, batch_per_device)
        for count in counts
        for variant in VARIANTS
    ]
