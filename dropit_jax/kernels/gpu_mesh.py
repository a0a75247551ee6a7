"""The mesh that a kernel is traced for, where there is no GPU to trace it for."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array


def for_a_gpu(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel, which is traced for some GPU where no mesh is in force.

    JAX asks which GPU it is from version 0.11 on. Our kernels are the same for all.
    """

    def traced(*operands: Array) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        if jax.default_backend() == "gpu" or not mesh.empty:
            return kernel(*operands)
        some = jax.sharding.AbstractDevice("NVIDIA A100", None, "gpu")
        with jax.sharding.use_abstract_mesh(mesh.update(abstract_device=some)):
            return kernel(*operands)

    return traced
