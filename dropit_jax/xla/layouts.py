"""How arrays lie in a GPU's memory.

XLA chooses the layout of each array by what the products around it like, and badly for
what is compressed between them: an axis that is not cut into groups comes to lie
innermost, and every pass over the groups is then a transposition.
"""

import functools

import jax
from jaxtyping import Array, Shaped

from dropit_jax.compat import Layout, with_layout_constraint
from dropit_jax.xla.partitioning import on_every_device
from dropit_jax.xla.platforms import by_platform


def row_major(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """`x`; on an NVIDIA GPU it lies in memory in the order of its axes."""
    return _laid_out(x, tuple(range(x.ndim)))


def of_tokens(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """`row_major(x)`, unless it may be of images.

    How images lie in memory convolutions choose, on some GPUs channels first.
    """
    return row_major(x) if x.ndim <= 3 else x


def of_heads(
    x: Shaped[Array, "*batch length heads depth"],
) -> Shaped[Array, "*batch length heads depth"]:
    """`x`; on an NVIDIA GPU it lies in memory as (*batch, heads, length, depth).

    So the products of attention read it. In row-major order XLA would add the bias of a
    projection within its product, from a copy of the bias for each token, which it
    makes for all layers in advance. An array of less than three axes is left as it is:
    attention has an error for it.
    """
    if x.ndim < 3:
        return x
    *batch, length, heads, depth = range(x.ndim)
    return _laid_out(x, (*batch, heads, length, depth))


def in_order(x: Shaped[Array, "*shape"], order: tuple[int, ...]) -> Array:
    """`x`; on an NVIDIA GPU its axes lie in this order, the outermost first."""
    return _laid_out(x, order)


# Traced once for all arrays of one shape.
@functools.partial(jax.jit, static_argnames="order", inline=True)
def _laid_out(x: Array, order: tuple[int, ...]) -> Array:
    constrained = functools.partial(_constrained, order=order)
    # XLA would gather what is to be laid out, where several devices share it.
    everywhere = on_every_device(constrained, results=1, elementwise=True)
    return by_platform(_as_it_is, cuda=everywhere)(x)


def _as_it_is(x: Array) -> Array:
    return x


def _constrained(x: Array, order: tuple[int, ...]) -> Array:
    """The array, its axes in this order, the outermost first, after any more axes."""
    mapped = x.ndim - len(order)
    order = (*range(mapped), *(mapped + axis for axis in order))
    return with_layout_constraint(x, Layout(order))
