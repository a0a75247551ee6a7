"""A choice between a GPU kernel and its definition in plain JAX."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array

from dropit_jax import compat
from dropit_jax.xla.partitioning import on_every_device


def kernel_or_definition(
    kernel: Callable[..., Any], definition: Callable[..., Any], results: int
) -> Callable[..., Any]:
    """Returns a function that runs `kernel` on every device.

    Where JAX cannot lower GPU kernels it runs `definition`. The choice is made when the
    function is traced.

    Args:
      kernel: a GPU kernel as `on_every_device` takes it.
      definition: the same function of the same arrays in plain JAX.
      results: the number of arrays that both return.
    """

    def traced(*operands: Array) -> Any:
        if compat.has_triton():
            return on_every_device(kernel, results)(*operands)
        return definition(*operands)

    return traced
