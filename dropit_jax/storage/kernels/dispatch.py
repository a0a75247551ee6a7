"""GPU kernels where there is an NVIDIA GPU, their definitions elsewhere."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from dropit_jax.storage.kernels import chunk_storage, definitions
from dropit_jax.storage.kernels.chunk_storage import ChunkStorage
from dropit_jax.storage.kernels.definitions import Positions
from dropit_jax.storage.kernels.on_gpu import kernel_or_definition
from dropit_jax.xla import cpu_calls
from dropit_jax.xla.platforms import by_platform

# A function of arrays with the same leading axes, which its results have too.
_Operation = Callable[..., Any]


# `jax.jit` keeps traces: layers of one shape are traced once, not each.
@functools.partial(jax.jit, static_argnames="storage", inline=True)
def compress(
    x: Float[Array, "*rows units elements"], storage: ChunkStorage
) -> tuple[Float[Array, "*rows units kept"], Positions]:
    """Returns `definitions.compress`, in one pass where a GPU kernel exists.

    The gradient of `x` is zero, as residuals are not differentiated.
    """
    definition = functools.partial(definitions.compress, storage=storage)
    kernel = functools.partial(_compress_kernel, storage=storage)
    x = lax.stop_gradient(x)
    if not _may_use_kernel(storage, x):
        return definition(x)
    operation = by_platform(
        definition,
        cpu=_compress_call(storage),
        one_cpu=_compress_call(storage, for_one_device=True),
        cuda=kernel_or_definition(kernel, definition, results=2),
    )
    return operation(x)


@functools.partial(jax.jit, static_argnames=("storage", "dtype"), inline=True)
def decompress(
    values: Float[Array, "*rows units kept"],
    positions: Positions,
    storage: ChunkStorage,
    dtype: jax.typing.DTypeLike,
    after: Shaped[Array, "..."] | None = None,
) -> Float[Array, "*rows units elements"]:
    """Returns `definitions.decompress`, in one pass where a GPU kernel exists.

    On a CPU the result is not computed before `after` is, if `_may_use_kernel` holds.
    """
    dtype = jnp.dtype(dtype)
    return _decompress_differentiably(storage, dtype, values, positions, after)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _decompress_differentiably(
    storage: ChunkStorage,
    dtype: jnp.dtype,
    values: Array,
    positions: Array,
    after: Array | None,
) -> Array:
    definition = functools.partial(definitions.decompress, storage=storage, dtype=dtype)
    kernel = functools.partial(_decompress_kernel, storage=storage, dtype=dtype)
    if not _may_use_kernel(storage, values):
        return definition(values, positions)
    operation = by_platform(
        definition,
        cpu=_decompress_call(functools.partial(definition, by_reduction=True)),
        cuda=kernel_or_definition(kernel, definition, results=1),
    )
    return operation(values, positions, after=after)


def _decompress_forward(
    storage: ChunkStorage,
    dtype: jnp.dtype,
    values: Array,
    positions: Array,
    after: Array | None,
) -> tuple[Array, Any]:
    # Neither a GPU kernel nor the bits that its definition works on have a gradient.
    def placed(values: Array) -> Array:
        return definitions.place_kept(values.astype(dtype), positions, storage)

    _, pullback = jax.vjp(placed, values)
    activation = _decompress_differentiably(storage, dtype, values, positions, after)
    return activation, pullback


def _decompress_backward(
    storage: ChunkStorage, dtype: jnp.dtype, pullback: Any, cotangent: Array
) -> tuple[Array, None, None]:
    del storage, dtype
    return (*pullback(cotangent), None, None)


_decompress_differentiably.defvjp(_decompress_forward, _decompress_backward)


# Importing Pallas takes long: these functions import it only for a program for a GPU.
def _compress_kernel(x: Array, storage: ChunkStorage) -> Any:
    from dropit_jax.storage.kernels import compress  # noqa: PLC0415

    return compress.compress(x, storage)


def _decompress_kernel(
    values: Array, positions: Array, storage: ChunkStorage, dtype: jnp.dtype
) -> Array:
    from dropit_jax.storage.kernels import decompress  # noqa: PLC0415

    return decompress.decompress(values, positions, storage, dtype)


def _compress_call(storage: ChunkStorage, for_one_device: bool = False) -> _Operation:
    """Returns `definitions.compress` as a call that XLA's CPU compiler does not inline.

    The call takes rows, (*rows, units * elements), as matrix products do, and without
    axes of size 1. XLA would compute an activation twice if it is read in two shapes,
    and would copy arrays with axes of size 1.

    Args:
      storage: how chunks are stored.
      for_one_device: whether the program is for one device; it then has the operand
        `definitions.first_index_operand` too.
    """

    def call(x: Array) -> Any:
        *rows, units, elements = x.shape
        ones = _axes_of_size_1(x)
        squeezed = [size for size in (*rows, units) if size != 1]
        before = (
            definitions.first_index_operand(squeezed, storage)
            if for_one_device
            else None
        )

        def inside(x: Array, *before: Array) -> Any:
            chunks = x.reshape(*squeezed, elements)
            x, *others = (lax.expand_dims(x, ones) for x in (chunks, *before))
            results = definitions.compress(x, storage, *others)
            return jax.tree.map(lambda x: lax.squeeze(x, ones), results)

        x = x.reshape(*rows, units * elements)
        x = lax.squeeze(x, [axis for axis in ones if axis != len(rows)])
        operands = (x,) if before is None else (x, before)
        results = cpu_calls.not_inlined(inside)(*operands)
        return jax.tree.map(lambda x: lax.expand_dims(x, ones), results)

    return call


def _decompress_call(definition: _Operation) -> _Operation:
    """Returns a function as a call that XLA's CPU compiler does not inline.

    The call takes arrays without axes of size 1, which XLA would copy.

    Args:
      definition: a function of values and positions.

    Returns:
      A function of the array to wait for, if any, and of values and positions.
    """

    def call(*operands: Array) -> Any:
        *after, values, positions = operands
        ones = _axes_of_size_1(values)

        def inside(*operands: Array) -> Array:
            activation = definition(*(lax.expand_dims(x, ones) for x in operands))
            return lax.squeeze(activation, ones)

        call_inside = (
            cpu_calls.call_after_operand(inside)
            if after
            else cpu_calls.not_inlined(inside)
        )
        squeezed = (lax.squeeze(x, ones) for x in (values, positions))
        return lax.expand_dims(call_inside(*after, *squeezed), ones)

    return call


def _axes_of_size_1(x: Array) -> list[int]:
    """Returns the axes of size 1, except for the last."""
    return [axis for axis, size in enumerate(x.shape[:-1]) if size == 1]


def _may_use_kernel(storage: ChunkStorage, x: Array) -> bool:
    """Returns whether a GPU kernel may be used here.

    A kernel cannot address more than `chunk_storage.fits` allows. On a mesh whose axes
    differ in type, the kernel would have to be partitioned in two ways at once.
    """
    mesh = jax.sharding.get_abstract_mesh()
    is_uniform = len(set(mesh.axis_types)) <= 1
    return is_uniform and chunk_storage.fits(storage, math.prod(x.shape[:-1]))
