"""Splits the last axis into blocks of one or more axes, and broadcasts to blocks.

Blocks of several axes let reductions over them be short along each axis, which XLA's
CPU compiler vectorises.
"""

import math

import numpy as np
from jax import lax
from jaxtyping import Array, Shaped

from dropit_jax.xla import shardings


def split(
    x: Shaped[Array, "*rows n"], *sizes: int, fill: int = 0
) -> Shaped[Array, "..."]:
    """Splits the last axis into blocks: `(*rows, n) -> (*rows, blocks, *sizes)`.

    The last block is padded with `fill`. With sizes 2, 2: `(3, 5) -> (3, 2, 2, 2)`.
    """
    *rows, n = x.shape
    block = math.prod(sizes)
    count = -(-n // block)
    return pad(x, count * block, fill).reshape(*rows, count, *sizes)


def merge(
    x: Shaped[Array, "..."], ndim: int, count: int | None = None
) -> Shaped[Array, "..."]:
    """Inverts `split`: merges the last axes so that `ndim` axes remain.

    With `count`, returns only the first `count` elements of the merged axis.
    """
    rows, size = x.shape[: ndim - 1], math.prod(x.shape[ndim - 1 :])
    flat = x.reshape(*rows, size)
    return flat if count is None else lax.slice_in_dim(flat, 0, count, axis=ndim - 1)


def pad(x: Shaped[Array, "*rows n"], size: int, value: int = 0) -> Array:
    """Pads the end of each row with `value`: `(*rows, n) -> (*rows, size)`."""
    *rows, n = x.shape
    if n == size:
        return x
    fill = np.asarray(value).astype(x.dtype)
    return lax.pad(x, fill, [(0, 0, 0)] * len(rows) + [(0, size - n, 0)])


def repeat_in_blocks(x: Shaped[Array, "*shape"], *sizes: int) -> Shaped[Array, "..."]:
    """Repeats each element in a block: `(*shape) -> (*shape, *sizes)`."""
    return lax.broadcast_in_dim(x, (*x.shape, *sizes), range(x.ndim))


def broadcast_to_rows(x: Shaped[np.ndarray, "..."], like: Array) -> Array:
    """Broadcasts a constant to the shape and sharding of an array.

    `(*sizes) -> (*rows, *sizes)`: each row of the result is `x`.
    """
    axes = range(like.ndim - x.ndim, like.ndim)
    return shardings.reshard_like(lax.broadcast_in_dim(x, like.shape, axes), like)
