"""A kernel where a GPU can run it."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array

from dropit_jax import compat


def kernel_or_twin(
    kernel: Callable[..., Any], twin: Callable[..., Any]
) -> Callable[..., Any]:
    """`kernel`, or `twin` where this JAX cannot lower kernels, which is known late."""

    def traced(*operands: Array) -> Any:
        return kernel(*operands) if compat.has_triton() else twin(*operands)

    return traced
