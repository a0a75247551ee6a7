"""Raises an error instead of a wrong second derivative."""

import functools

import jax
from jaxtyping import Array

_PLAIN = "the plain Flax layer or jax.nn function"


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def differentiable_once(x: Array, what: str, instead: str = _PLAIN) -> Array:
    """Returns `x`; raises an error if the result is differentiated.

    For arrays that a backward pass reads together with residuals that have no
    derivative, such as codes of 8 bits: a second derivative would silently lack the
    part of the gradient that depends on `x` through the residuals. A gradient under
    `jax.lax.stop_gradient` raises no error, as it is not differentiated.

    Args:
      x: an array that the backward pass gets or recomputes.
      what: the operation, for the error message.
      instead: the replacement of the operation, for the error message.

    Raises:
      TypeError: the result is differentiated; in forward mode, JAX's own error.
    """
    del what, instead
    return x


def _forward(x: Array, what: str, instead: str) -> tuple[Array, None]:
    del what, instead
    return x, None


def _backward(
    what: str, instead: str, residuals: None, cotangent: Array
) -> tuple[Array]:
    # JAX does not call this for a cotangent of zero, as under `jax.lax.stop_gradient`.
    del residuals, cotangent
    raise TypeError(
        f"{what} has no second derivative (jax.hessian, jax.grad of jax.grad): what it "
        f"stores for the first has none. Use {instead}."
    )


differentiable_once.defvjp(_forward, _backward)
