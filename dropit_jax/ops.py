"""`jax.lax` products that cache a compressed first operand for the weight gradient.

Both operations share one rule. For a product `z = op(a, θ)`, linear in each operand:

    forward    z = op(a, θ)                  cached: compress(a), θ
    backward   ∇a = opᵀ(·, θ)(∇z)            exact
               ∇θ = opᵀ(â, ·)(∇z)            â = decompress(compress(a))

(paper, Equations 2 and 3). Both transposes are derived from the operation itself, so
that JAX's own rules decide their dtypes, precision and shardings.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dropit_jax.policy import DropIT
from dropit_jax.residual import Residual, compress

# The name of what is cached, for `jax.checkpoint_policies.save_only_these_names`.
RESIDUAL_NAME = "dropit"

_Product = Callable[[Array, Array], Array]
# The compressed `a` (None: the kernel is frozen), the kernel, and opᵀ(·, kernel).
_Saved = tuple[Residual | None, Array, Callable[[Array], tuple[Array]]]


def dot_general(
    lhs: Float[Array, "..."],
    rhs: Float[Array, "..."],
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    out_sharding: Any = None,
    dropit: DropIT | None = None,
    operation: Callable[..., Array] = lax.dot_general,
) -> Float[Array, "..."]:
    """`lax.dot_general` that caches `lhs` compressed.

    Args:
      lhs: the activation.
      rhs: the kernel.
      dimension_numbers: as in `lax.dot_general`, and so are `precision`,
        `preferred_element_type` and `out_sharding`.
      dropit: what of `lhs` to keep for the gradient of `rhs`. The leading axis of a
        sample is the first that is not contracted; chunks run along the contracted
        axes. `None`: the plain operation.
      operation: what computes the product: a function with the signature of
        `lax.dot_general`, linear in each operand.

    Returns:
      The product, bit-identical to `operation`'s. The gradient of `lhs` is exact, that
      of `rhs` is the one that `operation` has at the sparse `lhs`.

    Raises:
      TypeError: `lhs` is not a real floating-point array.
    """
    kwargs: dict[str, Any] = {"precision": precision}
    # Replacements of `lax.dot_general` seldom take these, and seldom are they given.
    if preferred_element_type is not None:
        kwargs["preferred_element_type"] = preferred_element_type
    if out_sharding is not None:
        kwargs["out_sharding"] = out_sharding

    def product(lhs: Array, rhs: Array) -> Array:
        return operation(lhs, rhs, dimension_numbers, **kwargs)

    if dropit is None:
        return product(lhs, rhs)
    (contracted, _), (batch, _) = dimension_numbers
    free = [i for i in range(jnp.ndim(lhs)) if i not in (*contracted, *batch)]
    return _cached_product(product, dropit, (*batch, *free, *contracted), lhs, rhs)


def conv_general_dilated(
    lhs: Float[Array, "..."],
    rhs: Float[Array, "..."],
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    *,
    dropit: DropIT | None = None,
    operation: Callable[..., Array] = lax.conv_general_dilated,
) -> Float[Array, "..."]:
    """`lax.conv_general_dilated` that caches `lhs` compressed.

    Args:
      lhs: the activation.
      rhs: the kernel.
      window_strides: as in `lax.conv_general_dilated`, and so are all arguments up to
        `out_sharding`.
      dropit: what of `lhs` to keep for the gradient of `rhs`. Samples are cut in the
        order (batch, spatial axes, features), whatever the layout of `lhs`. `None`:
        the plain operation.
      operation: what computes the product: a function with the signature of
        `lax.conv_general_dilated`, linear in each operand.

    Returns:
      The convolution, bit-identical to `operation`'s. The gradient of `lhs` is exact,
      that of `rhs` is the one that `operation` has at the sparse `lhs`.

    Raises:
      TypeError: `lhs` is not a real floating-point array.
    """
    kwargs: dict[str, Any] = {
        "lhs_dilation": lhs_dilation,
        "rhs_dilation": rhs_dilation,
        "dimension_numbers": dimension_numbers,
        "feature_group_count": feature_group_count,
        "precision": precision,
    }
    if batch_group_count != 1:
        kwargs["batch_group_count"] = batch_group_count
    if preferred_element_type is not None:
        kwargs["preferred_element_type"] = preferred_element_type
    if out_sharding is not None:
        kwargs["out_sharding"] = out_sharding

    def product(lhs: Array, rhs: Array) -> Array:
        return operation(lhs, rhs, window_strides, padding, **kwargs)

    if dropit is None:
        return product(lhs, rhs)
    layout = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    batch, features, *spatial = layout.lhs_spec
    return _cached_product(product, dropit, (batch, *spatial, features), lhs, rhs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _cached_product(
    product: _Product, dropit: DropIT, order: tuple[int, ...], lhs: Array, rhs: Array
) -> Array:
    """`product(lhs, rhs)`, caching `lhs` compressed with its axes in this order."""
    del dropit, order
    return product(lhs, rhs)


def _forward(
    product: _Product, dropit: DropIT, order: tuple[int, ...], lhs: Any, rhs: Any
) -> tuple[Array, _Saved]:
    a, kernel = lhs.value, rhs.value
    residual = None
    if rhs.perturbed:  # a frozen kernel has no gradient: nothing of `a` to cache
        residual = compress(jnp.transpose(a, order), dropit)
        residual = checkpoint_name(residual, RESIDUAL_NAME)
        # Without the barrier XLA may compress late, which keeps `a` alive till then.
        a, residual = lax.optimization_barrier((a, residual))
    z, pullback_a = jax.vjp(lambda a: product(a, kernel), a)
    return z, (residual, kernel, pullback_a)


def _backward(
    product: _Product,
    dropit: DropIT,
    order: tuple[int, ...],
    saved: _Saved,
    cotangent: Array,
) -> tuple[Array, Array | None]:
    del dropit
    residual, kernel, pullback_a = saved
    if residual is None:
        return *pullback_a(cotangent), None
    # Without the barrier XLA may decompress early, which keeps the dense â alive
    # through the whole forward pass.
    residual, cotangent = lax.optimization_barrier((residual, cotangent))
    a_hat = jnp.transpose(residual.decompress(), tuple(np.argsort(order)))
    _, pullback_kernel = jax.vjp(lambda kernel: product(a_hat, kernel), kernel)
    return *pullback_a(cotangent), *pullback_kernel(cotangent)


# Symbolic zeros tell the forward rule which operands are differentiated.
_cached_product.defvjp(_forward, _backward, symbolic_zeros=True)
