"""Sets the order of an array's axes in the memory of an NVIDIA GPU.

XLA chooses each layout for the matrix products around an array. For an array compressed
between them it can put an axis innermost that is not cut into groups, so that every
pass over the groups is a transposition.
"""

import functools

import jax
from jaxtyping import Array, Shaped

from dropit_jax.compat import Layout, with_layout_constraint
from dropit_jax.xla.partitioning import on_every_device
from dropit_jax.xla.platforms import by_platform


def row_major(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """Returns `x`; on an NVIDIA GPU it lies in memory in the order of its axes."""
    return _laid_out(x, tuple(range(x.ndim)))


def row_major_unless_images(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """Returns `row_major(x)` if `x` has at most 3 axes, else `x`, which may be images.

    Convolutions choose the layout of images, on some GPUs channels first.
    """
    return row_major(x) if x.ndim <= 3 else x


def in_order(x: Shaped[Array, "*shape"], order: tuple[int, ...]) -> Array:
    """Returns `x`; on an NVIDIA GPU its axes lie in memory in this order.

    The outermost axis comes first. The shape is unchanged.
    """
    return _laid_out(x, order)


# Jitted, so that all arrays of one shape share one trace.
@functools.partial(jax.jit, static_argnames="order", inline=True)
def _laid_out(x: Array, order: tuple[int, ...]) -> Array:
    constrained = functools.partial(_constrained, order=order)
    # XLA would gather a sharded operand of a layout constraint on every device.
    sharded = on_every_device(constrained, results=1, elementwise=True)
    return by_platform(_unchanged, cuda=sharded)(x)


def _unchanged(x: Array) -> Array:
    return x


def _constrained(x: Array, order: tuple[int, ...]) -> Array:
    """Returns `x` with its axes in this order in memory, the outermost first.

    Leading axes that `order` does not count, as of `jax.vmap`, are outermost of all.
    """
    batch_axes = x.ndim - len(order)
    order = (*range(batch_axes), *(batch_axes + axis for axis in order))
    return with_layout_constraint(x, Layout(order))
