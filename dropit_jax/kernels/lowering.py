"""Kernels that are traced where they are lowered, for the mesh that they run on."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxtyping import Array

_Operation = Callable[..., Any]


def when_lowered(
    kernel: _Operation, *results: tuple[int, jax.typing.DTypeLike]
) -> _Operation:
    """The kernel; until it is lowered nothing is known but the shapes of its results.

    Args:
      kernel: takes arrays and gives arrays, one or more, of the same leading axes.
      *results: the size of the last axis and the type of each that it gives.
    """

    def operation(*operands: Array) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        given = _kernel_p.bind(*operands, kernel=kernel, results=results, mesh=mesh)
        return given[0] if len(results) == 1 else tuple(given)

    return operation


def _shapes(x: Any, *_: Any, results: Any, **__: Any) -> list[Any]:
    return [
        x.update(shape=(*x.shape[:-1], size), dtype=jnp.dtype(dtype))
        for size, dtype in results
    ]


def _run(*operands: Array, kernel: _Operation, results: Any, mesh: Any) -> list[Array]:
    del results
    with jax.sharding.use_abstract_mesh(_of_gpus(mesh)):
        return jax.tree.leaves(kernel(*operands))


def _of_gpus(mesh: Any) -> Any:
    """No mesh, but of some GPU, where there is none to lower a kernel for.

    JAX asks which it is from version 0.11 on. Our kernels are the same for all of them.
    """
    if jax.default_backend() == "gpu" or not mesh.empty:
        return mesh
    some = jax.sharding.AbstractDevice("NVIDIA A100", None, "gpu")
    return mesh.update(abstract_device=some)


_kernel_p = Primitive("dropit_kernel")
_kernel_p.multiple_results = True
_kernel_p.def_abstract_eval(_shapes)
_kernel_p.def_impl(_run)
mlir.register_lowering(_kernel_p, mlir.lower_fun(_run, multiple_results=True))
