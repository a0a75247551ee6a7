"""Whether a GPU runs a kernel, and what the kernel is traced for.

The environment variable `DROPIT_KERNELS`, set before a program starts, is the switch:
`triton`, the default, or `none`. Without kernels a GPU runs their definitions in plain
JAX; the results are the same.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from dropit_jax import compat

_SWITCH = "DROPIT_KERNELS"
_CHOICES = ("triton", "none")


def kernel_or_twin(
    kernel: Callable[..., Any], twin: Callable[..., Any]
) -> Callable[..., Any]:
    """`kernel`, or `twin` where this JAX cannot lower it or it is switched off.

    The kernel is traced for some GPU where no mesh is in force: JAX asks which one it
    is from version 0.11 on. Ours are the same for all.
    """

    def traced(*operands: Array) -> Any:
        if not _has_kernels():
            return twin(*operands)
        mesh = jax.sharding.get_abstract_mesh()
        if jax.default_backend() == "gpu" or not mesh.empty:
            return kernel(*operands)
        some = jax.sharding.AbstractDevice("NVIDIA A100", None, "gpu")
        with jax.sharding.use_abstract_mesh(mesh.update(abstract_device=some)):
            return kernel(*operands)

    return traced


def _has_kernels() -> bool:
    choice = os.environ.get(_SWITCH, _CHOICES[0])
    if choice not in _CHOICES:
        raise ValueError(f"{_SWITCH} is {choice!r}: set it to one of {_CHOICES}.")
    return choice == "triton" and compat.has_triton()
