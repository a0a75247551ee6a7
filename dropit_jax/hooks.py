"""What the layers of `linen` and `nnx` have in common: hooks, replaced for one call."""

import contextlib
from collections.abc import Iterator
from typing import Any

from jaxtyping import Array

from dropit_jax import sharing


@contextlib.contextmanager
def replaced(module: Any, **fields: Any) -> Iterator[None]:
    """Gives fields of a module other values, for one call of it."""
    before = {name: getattr(module, name) for name in fields}
    # Modules refuse assignment while they run, rightly: they must not change from call
    # to call. These fields are put back before anyone can see them.
    for name, value in fields.items():
        object.__setattr__(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(module, name, value)


def cast_once(inputs: Any, cast: Array, how: Any) -> Array:
    """The cast of some inputs, the same array for all layers that read them.

    Otherwise each would cache a tensor of its own.

    Args:
      inputs: what is cast.
      cast: what a layer cast them to.
      how: all else that this depends on.
    """
    return sharing.once(lambda: cast, (inputs,), ("cast", how, cast.dtype))


def as_batch(inputs: Array, spatial: int) -> tuple[Array, tuple[int, ...]]:
    """The inputs of a convolution with one axis for the batch, and what it was.

    As in Flax, all axes of the batch become one, and a single sample a batch of one.
    """
    batch = inputs.shape[: inputs.ndim - spatial - 1]
    if len(batch) == 1:
        return inputs, batch
    return inputs.reshape(-1, *inputs.shape[len(batch) :]), batch


def unbatch(out: Array, batch: tuple[int, ...]) -> Array:
    """The inverse of `as_batch`, for the outputs."""
    return out if len(batch) == 1 else out.reshape(*batch, *out.shape[1:])
