"""A kernel where a GPU can run it, and what it is traced for."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from dropit_jax import compat


def kernel_or_twin(
    kernel: Callable[..., Any], twin: Callable[..., Any]
) -> Callable[..., Any]:
    """`kernel`, or `twin` where this JAX cannot lower kernels.

    The kernel is traced for some GPU where no mesh is in force: JAX asks which one it
    is from version 0.11 on. Ours are the same for all.
    """

    def traced(*operands: Array) -> Any:
        if not compat.has_triton():
            return twin(*operands)
        mesh = jax.sharding.get_abstract_mesh()
        if jax.default_backend() == "gpu" or not mesh.empty:
            return kernel(*operands)
        some = jax.sharding.AbstractDevice("NVIDIA A100", None, "gpu")
        with jax.sharding.use_abstract_mesh(mesh.update(abstract_device=some)):
            return kernel(*operands)

    return traced
