"""How arrays lie in a GPU's memory.

XLA chooses the layout of each array by what the products around it like, and badly for
what is compressed between them: an axis that is not cut into groups comes to lie
innermost, and every pass over the groups is then a transposition.
"""

import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Shaped


def row_major(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """`x`; on an NVIDIA GPU it lies in memory in the order of its axes."""
    return _row_major_p.bind(x)


def of_tokens(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """`row_major(x)`, unless it may be of images.

    How images lie in memory convolutions choose, on some GPUs channels first.
    """
    return row_major(x) if x.ndim <= 3 else x


def _constrained(x: Array) -> Array:
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _batched(operands: tuple[Array], axes: tuple[int]) -> tuple[Array, int]:
    return row_major(jnp.moveaxis(operands[0], axes[0], 0)), 0


_row_major_p = Primitive("dropit_row_major")
_row_major_p.def_impl(lambda x: x)
_row_major_p.def_abstract_eval(lambda x: x)
ad.deflinear2(_row_major_p, lambda cotangent, _: [row_major(cotangent)])
batching.primitive_batchers[_row_major_p] = _batched
mlir.register_lowering(_row_major_p, lambda _, x: [x])
mlir.register_lowering(
    _row_major_p,
    mlir.lower_fun(_constrained, multiple_results=False),
    platform="cuda",
)
