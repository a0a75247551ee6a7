"""Arrays that may be differentiated once, and no more."""

import functools

import jax
from jaxtyping import Array

_PLAIN = "the plain Flax layer or jax.nn function"


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def once(x: Array, what: str, instead: str = _PLAIN) -> Array:
    """Returns `x`, for a rule that stores something of it without a derivative.

    To differentiate the rule, which is to differentiate a second time, would leave out
    what reaches the gradient through the stored values: it would be wrong without a
    word. A gradient that is detached (`jax.lax.stop_gradient`) nobody differentiates,
    though it stands in a function that is differentiated.

    Args:
      x: an array that the rule is given or rebuilds.
      what: the operation, as the error names it.
      instead: the remedy, as the error names it.

    Raises:
      TypeError: where it is differentiated; in forward mode JAX's own.
    """
    del what, instead
    return x


def _forward(x: Array, what: str, instead: str) -> tuple[Array, None]:
    del what, instead
    return x, None


def _backward(
    what: str, instead: str, residuals: None, cotangent: Array
) -> tuple[Array]:
    # A cotangent that is zero, as of a gradient that is detached, does not get here.
    del residuals, cotangent
    raise TypeError(
        f"{what} has no second derivative (jax.hessian, jax.grad of jax.grad): what it "
        f"stores for the first has none. Use {instead}."
    )


once.defvjp(_forward, _backward)
