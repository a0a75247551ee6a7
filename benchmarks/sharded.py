"""Memory and collectives of a training step on devices that share its batch.

Steps are compiled and not run: the devices may be simulated.
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

from benchmarks.sweeps import VARIANTS
from benchmarks.variants import TIMED_VARIANTS
from benchmarks.workloads import Workload
from dropit_jax import memory

DEVICES = (1, 2, 4, 8)
_BATCH_PER_DEVICE = 8
_COLLECTIVE = re.compile(
    r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)


@dataclasses.dataclass(frozen=True)
class OnDevices:
    """Memory and collectives of a step; each device has the same part of the batch.

    Attributes:
      kind: "devices".
      devices: how many.
      variant: which way of saving memory.
      batch_per_device: images on each.
      collectives: in the compiled step, by kind.
      cached_bytes: of all arrays that the backward pass is given, on one device; the
        parameters are among them, constants are not.
      temp_bytes: that the compiled step allocates on one device beside arguments and
        results.
    """

    kind: str
    devices: int
    variant: str
    batch_per_device: int
    collectives: dict[str, int]
    cached_bytes: int
    temp_bytes: int


def on_devices(
    workload: Workload, variant: str, count: int, batch_per_device: int
) -> OnDevices:
    """Compiles a step for a number of devices that share the batch."""
    mesh = jax.make_mesh(
        (count,), ("data",), (AxisType.Auto,), devices=jax.devices()[:count]
    )
    everywhere, shared = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    how = TIMED_VARIANTS[variant]
    batch = count * batch_per_device
    step, arguments, _ = workload.training_step(how, batch)
    jitted = jax.jit(
        step,
        in_shardings=(everywhere, everywhere, shared, shared),
        out_shardings=everywhere,
    )
    compiled = jitted.lower(*arguments).compile()
    variables, _, images, _ = arguments
    backward = functools.partial(_backward, workload.make(how.layers))
    return OnDevices(
        "devices",
        count,
        variant,
        batch_per_device,
        collectives(compiled.as_text() or ""),
        bytes_a_device(backward, (variables, images), (everywhere, shared)),
        memory.memory_stats(compiled)["temp_bytes"],
    )


def _backward(model: Any, variables: Any, images: jax.Array) -> Any:
    """The backward pass of a model, a function that holds its residuals."""

    def forward(params: Any) -> Any:
        given = variables | {"params": params}
        return model.apply(given, images, True, mutable=["batch_stats"])

    return jax.vjp(forward, variables["params"])[1]


def collectives(program: str) -> dict[str, int]:
    """How often each kind of collective is in a compiled program."""
    return dict(sorted(collections.Counter(_COLLECTIVE.findall(program)).items()))


def bytes_a_device(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    shardings: Sequence[NamedSharding],
) -> int:
    """Bytes on one device of what a function computes, as the compiler shards that.

    Results that depend on no argument, such as zeros, do not count: where the function
    is part of a program, nothing holds them.

    Args:
      function: of arrays; it does not run.
      arguments: arrays or `jax.ShapeDtypeStruct`s.
      shardings: of each of these.
    """
    jitted = jax.jit(function, in_shardings=tuple(shardings))
    results = jax.tree.leaves(jitted.lower(*arguments).compile().out_info)
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, counts in zip(results, _depends(function, arguments), strict=True)
        if counts
    )


def _depends(function: Callable[..., Any], arguments: Sequence[Any]) -> list[bool]:
    """Whether each result depends on any argument."""
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
    """Compiles every variant of a step for every number of devices."""
    return [
        on_devices(workload, variant, count, batch_per_device)
        for count in counts
        for variant in VARIANTS
    ]
