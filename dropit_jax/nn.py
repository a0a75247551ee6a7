"""Activation functions whose cached residual is compact."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

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


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("packed",), meta_fields=("group",)
)
@dataclasses.dataclass(frozen=True)
class _Sign:
    """Where `x > 0`: its bits, packed, and what is sharded like `x`."""

    packed: UInt8[Array, "*rows bytes"]
    group: int


def _relu_forward(x: Array) -> tuple[Array, _Sign]:
    x = shardings.join(x, group := shardings.new_group())
    rows = chunking.as_rows(x > 0, chunking.cut(x.shape, 8))
    return jax.nn.relu(x), _Sign(packing.pack(rows, 1), group)


def _relu_backward(saved: _Sign, cotangent: Array) -> tuple[Array]:
    # Without the barrier XLA may unpack early and keep the unpacked mask alive.
    packed, cotangent = lax.optimization_barrier((saved.packed, cotangent))
    rows = chunking.cut(cotangent.shape, 8)
    sign = packing.unpack(packed, 1, rows.row_size).astype(bool)
    sign = shardings.like(sign.reshape(cotangent.shape), cotangent)
    sign = shardings.join(sign, saved.group)
    return (jnp.where(sign, cotangent, 0),)


relu.defvjp(_relu_forward, _relu_backward)
