"""The first operand of a product as it is cached: arranged, compressed, rebuilt."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from dropit_jax import sharing
from dropit_jax.policy import DropIT
from dropit_jax.storage.residual import Residual, compress
from dropit_jax.storage.shapes import Shape
from dropit_jax.xla import layouts, shardings
from dropit_jax.xla.barriers import barrier

# The name of the residual, for `jax.checkpoint_policies.save_only_these_names`.
RESIDUAL_NAME = "dropit"


@dataclasses.dataclass(frozen=True)
class Axes:
    """How an operand's axes are to be read: as (batch, *positions, channels).

    Attributes:
      order: its axes, those of the samples first, those of the channels last.
      channel_axes: how many of the last are the channels.
      row_major: whether what is compressed, and the cotangent, lie in a GPU's memory in
        the order of their axes; else XLA lays them out as convolutions like.
    """

    order: tuple[int, ...]
    channel_axes: int = 1
    row_major: bool = False

    def laid_out(self, x: Array) -> Array:
        """An array as it is to lie in memory."""
        return layouts.row_major(x) if self.row_major else x


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("residual",),
    meta_fields=("shape", "spec", "group"),
)
@dataclasses.dataclass(frozen=True)
class CachedOperand:
    """A compressed operand.

    Attributes:
      residual: the compressed array, arranged.
      shape: the operand's shape.
      spec: the operand's explicit sharding.
      group: the number of the arrays that are sharded like the operand.
    """

    residual: Residual
    shape: Shape
    spec: shardings.Spec
    group: int

    def restored(self, axes: Axes, cotangent: Array) -> Array:
        """The decompressed operand, computed after a cotangent."""
        # Without the barrier XLA may decompress early, which keeps the dense operand
        # alive through the whole forward pass.
        residual, cotangent = barrier((self.residual, cotangent))
        restored = _restored(residual, cotangent, self.shape, axes)
        return shardings.join(shardings.to(restored, self.spec), self.group)


# Static: `sharing.once` gives the same to all who ask for the same.
@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Compression:
    """A function that compresses an operand; equal ones do the same.

    Attributes:
      dropit: the policy.
      axes: how the operand is arranged.
      group: the number of the arrays that are sharded like the operand.
    """

    dropit: DropIT
    axes: Axes
    group: int

    @classmethod
    def of(
        cls, operand: Array, dropit: DropIT, axes: Axes, key: Array | None
    ) -> "Compression":
        """Returns the same for all products that read the same operand alike."""
        operands = (operand,) if key is None else (operand, key)
        return sharing.once(
            lambda: cls(dropit, axes, shardings.new_group()), operands, (dropit, axes)
        )

    def __call__(self, operand: Array, key: Array | None = None) -> CachedOperand:
        """Compresses the operand."""
        operand = lax.stop_gradient(operand)
        joined = shardings.join(operand, self.group)
        residual = _residual(joined, self.dropit, self.axes, key)
        named = checkpoint_name(residual, RESIDUAL_NAME)
        return CachedOperand(named, operand.shape, shardings.spec(operand), self.group)


def bytes_cached(operand: Array, dropit: DropIT, axes: Axes) -> int | None:
    """The size of the residual; `None` where the operand does not suit the policy."""

    def compressed(a: Array, key: Array) -> Residual:
        return compress(_arrange(a, dropit, axes), dropit, key)

    try:
        return jax.eval_shape(compressed, operand, jax.random.key(0)).nbytes
    except (TypeError, ValueError):
        return None  # which the forward rule says, if a gradient is asked for


@functools.partial(jax.jit, static_argnames=("dropit", "axes"), inline=True)
def _residual(a: Array, dropit: DropIT, axes: Axes, key: Array | None) -> Residual:
    return compress(_arrange(a, dropit, axes), dropit, key)


def _arrange(a: Array, dropit: DropIT, axes: Axes) -> Array:
    """The operand as (batch, *positions, channels)."""
    ordered = axes.laid_out(jnp.transpose(a, axes.order))
    if axes.channel_axes == 1:
        return ordered
    lead = ordered.ndim - axes.channel_axes
    if dropit.per_channel:
        ordered = shardings.gather(ordered, keep=lead)
    elif any(shardings.spec(ordered)):
        return ordered  # chunks are the same, and no axis need be gathered
    # What is compressed alike is compiled once: heads as the features of other layers.
    return ordered.reshape(*ordered.shape[:lead], math.prod(ordered.shape[lead:]))


@functools.partial(jax.jit, static_argnames=("shape", "axes"), inline=True)
def _restored(residual: Residual, after: Array, shape: Shape, axes: Axes) -> Array:
    """The decompressed â, as `a` was, computed after something else."""
    ordered = residual.decompress(after).reshape([shape[axis] for axis in axes.order])
    return jnp.transpose(axes.laid_out(ordered), tuple(np.argsort(axes.order)))
