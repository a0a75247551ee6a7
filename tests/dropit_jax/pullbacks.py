"""Values and gradients of functions, compiled in one."""

import jax
import jax.numpy as jnp


def value_and_pullback(fn, x, cotangent):
    """The value, and the gradient of this cotangent."""

    @jax.jit
    def run(x, cotangent):
        y, pullback = jax.vjp(fn, x)
        return y, *pullback(cotangent)

    return run(x, cotangent)


def value_and_gradients(fn, *args):
    """The value, and the gradients of all arguments for a cotangent that varies."""

    @jax.jit
    def run(args):
        value, pullback = jax.vjp(fn, *args)
        cotangent = jnp.cos(jnp.arange(value.size)).reshape(value.shape)
        return value, pullback(cotangent.astype(value.dtype))

    return run(args)
