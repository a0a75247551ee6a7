"""Activation functions whose cached residual is compact."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dropit_jax import chunking, packing, shardings


@jax.custom_vjp
def relu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Rectified linear unit, `max(x, 0)`, that caches one bit an element.

    `jax.nn.relu` leaves it to XLA to recompute where `x > 0` from a dense tensor, which
    that tensor has to stay alive for. Value and gradient are `jax.nn.relu`'s to the
    last bit, the gradient at 0 (which is 0) and at NaN included.

    Args:
      x: any real floating dtype.
    """
    return jax.nn.relu(x)


def _relu_forward(x: Array) -> tuple[Array, Array]:
    rows = chunking.cut(x.shape, 8)
    return jax.nn.relu(x), packing.pack(chunking.as_rows(x > 0, rows), 1)


def _relu_backward(packed: Array, cotangent: Array) -> tuple[Array]:
    # Without the barrier XLA may unpack early and keep the unpacked mask alive.
    packed, cotangent = lax.optimization_barrier((packed, cotangent))
    rows = chunking.cut(cotangent.shape, 8)
    sign = packing.unpack(packed, 1, rows.row_size).astype(bool)
    sign = shardings.like(sign.reshape(cotangent.shape), cotangent)
    return (jnp.where(sign, cotangent, 0),)


relu.defvjp(_relu_forward, _relu_backward)
