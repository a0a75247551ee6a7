"""`flax.linen.Dropout` that caches its mask in bits."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dropit_jax import compat
from dropit_jax.nn.dropout import dropout


class Dropout(nn.Dropout):
    """`flax.linen.Dropout` that caches one bit an element of its mask.

    Output and gradient are those of Flax's layer, bit for bit.
    """

    @nn.compact
    def __call__(
        self,
        inputs: Float[Array, "*shape"],
        deterministic: bool | None = None,
        rng: Array | None = None,
    ) -> Float[Array, "*shape"]:
        """Drops elements at random, unless it is deterministic."""
        call = compat.without_flax_wrapper(super().__call__)
        return compact(self, call, inputs, deterministic, rng)


def compact(
    module: nn.Dropout,
    method: Callable[..., Array],
    inputs: Any,
    deterministic: bool | None = None,
    rng: Array | None = None,
) -> Array:
    """`method(inputs, deterministic, rng)`, with a compact residual.

    Args:
      module: an `nn.Dropout`, bound.
      method: the `__call__` of Flax's layer for it.
      inputs: of the call.
      deterministic: of the call.
      rng: of the call.
    """
    still = nn.merge_param("deterministic", module.deterministic, deterministic)
    x = jnp.asarray(inputs)
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    # In Flax's order: `still` may be traced where the rate is 0.
    if module.rate == 0.0 or still or module.rate == 1.0 or not floating:
        return method(inputs, deterministic, rng)
    key: jax.Array = module.make_rng(module.rng_collection) if rng is None else rng
    return dropout(x, module.rate, key, broadcast_dims=tuple(module.broadcast_dims))
