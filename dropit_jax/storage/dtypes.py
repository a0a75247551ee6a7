"""Types to compute in, whatever `jax_numpy_dtype_promotion` allows of operations."""

import functools

import jax
import jax.numpy as jnp


def common(*dtypes: jax.typing.DTypeLike) -> jnp.dtype:
    """The type that holds the values of all of these, by JAX's standard rules."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.dtype(functools.reduce(jnp.promote_types, dtypes))


def wide(*dtypes: jax.typing.DTypeLike) -> jnp.dtype:
    """The common type of these and float32, to compute in."""
    return common(jnp.float32, *dtypes)
