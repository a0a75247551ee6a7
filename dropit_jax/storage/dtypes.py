"""Dtypes to compute in, the same under every setting of `jax_numpy_dtype_promotion`."""

import functools

import jax
import jax.numpy as jnp


def common(*dtypes: jax.typing.DTypeLike) -> jnp.dtype:
    """Returns the dtype to which JAX's standard promotion converts all `dtypes`."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.dtype(functools.reduce(jnp.promote_types, dtypes))


def wide(*dtypes: jax.typing.DTypeLike) -> jnp.dtype:
    """Returns the common dtype of `dtypes` and float32, to compute in."""
    return common(jnp.float32, *dtypes)
