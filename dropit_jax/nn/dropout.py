"""Dropout that caches its mask in bits."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Inexact, Shaped

from dropit_jax.nn import element_codes
from dropit_jax.nn.element_codes import Codes
from dropit_jax.storage.shapes import Shape
from dropit_jax.xla import shardings


def dropout(
    x: Inexact[Array, "*shape"],
    rate: float,
    key: Shaped[Array, "..."],
    *,
    broadcast_dims: Sequence[int] = (),
) -> Inexact[Array, "*shape"]:
    """`x / (1 - rate)` where a random mask is set and 0 elsewhere; caches the mask.

    The mask is cached in one bit for each of its elements; Flax leaves a byte for each
    element of `x` to XLA. Value and gradient are those of `flax.linen.Dropout`, with
    this key, to the last bit.

    Args:
      x: any floating dtype.
      rate: the probability of a zero, a number. At 0 the result is `x`; at 1 it is 0,
        and so is the gradient.
      key: a PRNG key.
      broadcast_dims: axes along which all elements share one of the mask.

    Raises:
      TypeError: `x` is not floating.
      ValueError: the rate is not in [0, 1], or `x` has no such axis.
    """
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(f"dropout takes floating-point arrays, got {x.dtype}.")
    if not 0 <= rate <= 1:
        raise ValueError(f"dropout takes a rate in [0, 1], got {rate!r}.")
    if rate == 0:
        return x
    if rate == 1:
        return jnp.zeros_like(x)
    shared = _axes(x, broadcast_dims)
    keep_prob = 1.0 - float(rate)
    return _masked(keep_prob, shared, x, _mask(key, keep_prob, x, shared))


def _axes(x: Array, dims: Sequence[int]) -> frozenset[int]:
    if not all(-x.ndim <= dim < x.ndim for dim in dims):
        raise ValueError(f"dropout got broadcast_dims={dims} for a shape of {x.shape}.")
    return frozenset(dim % x.ndim for dim in dims)


def _mask_shape(shape: Shape, shared: frozenset[int]) -> Shape:
    return tuple(1 if axis in shared else size for axis, size in enumerate(shape))


def _mask(
    key: Array, keep_prob: float, x: Array, shared: frozenset[int]
) -> Bool[Array, "..."]:
    spec = [None if i in shared else names for i, names in enumerate(shardings.spec(x))]
    # Where shardings are explicit, each device draws its own part.
    sharding = PartitionSpec(*spec) if any(spec) else None
    shape = _mask_shape(x.shape, shared)
    return jax.random.bernoulli(key, keep_prob, shape, out_sharding=sharding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _masked(keep_prob: float, shared: frozenset[int], x: Array, mask: Array) -> Array:
    del shared
    each = shardings.like(jnp.broadcast_to(mask, x.shape), x)
    return _select(keep_prob, x, each)


def _select(keep_prob: float, x: Array, mask: Array) -> Array:
    return lax.select(mask, x / keep_prob, jnp.zeros_like(x))


def _masked_forward(
    keep_prob: float, shared: frozenset[int], x: Array, mask: Array
) -> tuple[Array, Codes]:
    del shared
    x, each, saved = element_codes.store_apart(x, mask, bits=1, name="dropout")
    return _select(keep_prob, x, each), saved


def _masked_backward(
    keep_prob: float, shared: frozenset[int], saved: Codes, cotangent: Array
) -> tuple[Array, None]:
    shape = _mask_shape(cotangent.shape, shared)
    mask = element_codes.load(saved, cotangent, shape)
    kept = lax.select(mask.astype(bool), cotangent, jnp.zeros_like(cotangent))
    return kept / keep_prob, None


_masked.defvjp(_masked_forward, _masked_backward)
