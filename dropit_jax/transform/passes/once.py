"""A value that may be differentiated no more."""

import jax
from jaxtyping import Array


@jax.custom_vjp
def once(x: Array) -> Array:
    """Returns `x`, whose derivative is an error.

    A decoded value is a function of codes, whose derivative would be zero: a second
    derivative would be wrong without a word. A cotangent of zero, as of a gradient that
    is detached, does not get here.
    """
    return x


def _forward(x: Array) -> tuple[Array, None]:
    return x, None


def _backward(residuals: None, cotangent: Array) -> tuple[Array]:
    del residuals, cotangent
    raise NotImplementedError(
        "A gradient of a function that dropit_jax.drop made cannot be differentiated "
        "again: values that are stored with an error have no derivative. Detach it "
        "with jax.lax.stop_gradient, take the preset 'exact', or differentiate the "
        "plain function."
    )


once.defvjp(_forward, _backward)
