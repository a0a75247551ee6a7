"""Compresses the first operand of a product, and decompresses it for a gradient."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from dropit_jax.policy import DropIT
from dropit_jax.storage.residual import Residual, compress
from dropit_jax.storage.shapes import Shape
from dropit_jax.xla import layouts, shardings
from dropit_jax.xla.barriers import barrier

# The name of the residual, for `jax.checkpoint_policies.save_only_these_names`.
RESIDUAL_NAME = "dropit"


@dataclasses.dataclass(frozen=True)
class Axes:
    """The order of an operand's axes, as (batch, *positions, *channels).

    Attributes:
      order: the operand's axes: first the axis of the samples, last the channels. For a
        convolution's input (batch, channels, height, width): `(0, 2, 3, 1)`.
      channel_axes: the number of channel axes.
      row_major: whether the operand and the cotangent are in row-major order in a GPU's
        memory; if not, XLA chooses the layout, as convolutions prefer.
    """

    order: tuple[int, ...]
    channel_axes: int = 1
    row_major: bool = False

    def laid_out(self, x: Array) -> Array:
        """Returns `x`, in row-major order if `row_major`."""
        return layouts.row_major(x) if self.row_major else x


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("residual",),
    meta_fields=("shape", "spec", "group"),
)
@dataclasses.dataclass(frozen=True)
class CachedOperand:
    """The residual of an operand.

    Attributes:
      residual: the compressed operand, its axes in the order of `Axes`.
      shape: the operand's shape.
      spec: the operand's explicit sharding.
      group: the number of the sharding group of the operand.
    """

    residual: Residual
    shape: Shape
    spec: shardings.Spec
    group: int

    def restored(self, axes: Axes, cotangent: Array) -> Array:
        """Returns the decompressed operand, computed after the cotangent."""
        # Without the barrier XLA may decompress early. The dense operand would then be
        # in memory from the forward pass on.
        residual, cotangent = barrier((self.residual, cotangent))
        restored = _restored(residual, cotangent, self.shape, axes)
        return shardings.join_group(shardings.reshard(restored, self.spec), self.group)


@dataclasses.dataclass(frozen=True)
class Compression:
    """A function that returns the residual of an operand.

    Attributes:
      dropit: the policy.
      axes: the order of the operand's axes.
      group: the number of the sharding group of the operand.
    """

    dropit: DropIT
    axes: Axes
    group: int

    def __call__(self, operand: Array, key: Array | None = None) -> CachedOperand:
        """Returns the residual of the operand."""
        operand = lax.stop_gradient(operand)
        joined = shardings.join_group(operand, self.group)
        residual = _residual(joined, self.dropit, self.axes, key)
        named = checkpoint_name(residual, RESIDUAL_NAME)
        return CachedOperand(
            named, operand.shape, shardings.explicit_spec(operand), self.group
        )


def bytes_cached(operand: Array, dropit: DropIT, axes: Axes) -> int | None:
    """Returns the bytes of the residual; `None` if the policy refuses the operand."""

    def compressed(a: Array, key: Array) -> Residual:
        return compress(_arrange(a, dropit, axes), dropit, key)

    try:
        return jax.eval_shape(compressed, operand, jax.random.key(0)).nbytes
    except (TypeError, ValueError):
        return None  # the forward rule raises the error, if there is a gradient


@functools.partial(jax.jit, static_argnames=("dropit", "axes"), inline=True)
def _residual(a: Array, dropit: DropIT, axes: Axes, key: Array | None) -> Residual:
    return compress(_arrange(a, dropit, axes), dropit, key)


def _arrange(a: Array, dropit: DropIT, axes: Axes) -> Array:
    """Returns the operand as (batch, *positions, channels).

    With two channel axes `(8, 16, 4, 32) -> (8, 16, 128)`. The channels stay two axes
    if an axis is sharded and the policy is not per channel.
    """
    ordered = axes.laid_out(jnp.transpose(a, axes.order))
    if axes.channel_axes == 1:
        return ordered
    lead = ordered.ndim - axes.channel_axes
    if dropit.per_channel:
        ordered = shardings.gather(ordered, keep=lead)
    elif any(shardings.explicit_spec(ordered)):
        return ordered  # chunks are the same, and no axis has to be gathered
    # One axis: XLA compiles a selection once for attention heads and other layers.
    return ordered.reshape(*ordered.shape[:lead], math.prod(ordered.shape[lead:]))


@functools.partial(jax.jit, static_argnames=("shape", "axes"), inline=True)
def _restored(residual: Residual, after: Array, shape: Shape, axes: Axes) -> Array:
    """Returns the decompressed operand in its own shape, computed after `after`."""
    ordered = residual.decompress(after).reshape([shape[axis] for axis in axes.order])
    return jnp.transpose(axes.laid_out(ordered), tuple(np.argsort(axes.order)))


def flatten_batch(inputs: Array, spatial: int) -> tuple[Array, tuple[int, ...]]:
    """Returns the inputs of a convolution with one batch axis, and the batch's shape.

    `(*batch, *positions, channels) -> (size, *positions, channels)`, as in Flax. With
    two spatial axes `(2, 3, 8, 8, 4)` gives an array `(6, 8, 8, 4)` and the shape
    `(2, 3)`, and the single sample `(8, 8, 4)` gives `(1, 8, 8, 4)` and `()`.
    """
    batch = inputs.shape[: inputs.ndim - spatial - 1]
    if len(batch) == 1:
        return inputs, batch
    return inputs.reshape(-1, *inputs.shape[len(batch) :]), batch


def unflatten_batch(out: Array, batch: tuple[int, ...]) -> Array:
    """Returns the outputs with the batch's shape: inverts `flatten_batch`.

    For the batch shape `(2, 3)`: `(6, 8, 8, 4) -> (2, 3, 8, 8, 4)`.
    """
    return out if len(batch) == 1 else out.reshape(*batch, *out.shape[1:])
