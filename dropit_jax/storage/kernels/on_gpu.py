"""A kernel where a GPU can run it."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array

from dropit_jax import compat
from dropit_jax.xla.partitioning import on_every_device


def kernel_or_twin(
    kernel: Callable[..., Any], twin: Callable[..., Any], results: int
) -> Callable[..., Any]:
    """`kernel` on every device, or `twin` where this JAX cannot lower kernels.

    Which one is known when it is traced.

    Args:
      kernel: as `on_every_device` takes it.
      twin: a function of the same arrays in plain JAX.
      results: how many arrays they give.
    """

    def traced(*operands: Array) -> Any:
        if compat.has_triton():
            return on_every_device(kernel, results)(*operands)
        return twin(*operands)

    return traced
