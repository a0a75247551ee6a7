"""The last axis in blocks, which may have several axes, and what is alike in all."""

import math

import numpy as np
from jax import lax
from jaxtyping import Array, Shaped

from dropit_jax.xla import shardings


def split(
    x: Shaped[Array, "*rows n"], *sizes: int, fill: int = 0
) -> Shaped[Array, "..."]:
    """The last axis as several, filled up: (*rows, n) to (*rows, blocks, *sizes)."""
    *rows, n = x.shape
    block = math.prod(sizes)
    count = -(-n // block)
    return pad(x, count * block, fill).reshape(*rows, count, *sizes)


def merge(
    x: Shaped[Array, "..."], ndim: int, count: int | None = None
) -> Shaped[Array, "..."]:
    """The inverse of `split`: an array of so many axes, or its first elements."""
    rows, size = x.shape[: ndim - 1], math.prod(x.shape[ndim - 1 :])
    flat = x.reshape(*rows, size)
    return flat if count is None else lax.slice_in_dim(flat, 0, count, axis=ndim - 1)


def pad(x: Shaped[Array, "*rows n"], size: int, value: int = 0) -> Array:
    """Rows filled up to a size at their end."""
    *rows, n = x.shape
    if n == size:
        return x
    fill = np.asarray(value).astype(x.dtype)
    return lax.pad(x, fill, [(0, 0, 0)] * len(rows) + [(0, size - n, 0)])


def spread(x: Shaped[Array, "*shape"], *sizes: int) -> Shaped[Array, "..."]:
    """Each element in a block: (*shape) to (*shape, *sizes)."""
    return lax.broadcast_in_dim(x, (*x.shape, *sizes), range(x.ndim))


def along(x: Shaped[np.ndarray, "..."], like: Array) -> Array:
    """An array in each block of another: (*sizes) to (*rows, *sizes)."""
    axes = range(like.ndim - x.ndim, like.ndim)
    return shardings.like(lax.broadcast_in_dim(x, like.shape, axes), like)
