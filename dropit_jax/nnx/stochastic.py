"""`flax.nnx.Dropout` that caches its mask in bits."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dropit_jax.nn.dropout import dropout


class Dropout(nnx.Dropout):
    """`flax.nnx.Dropout` that caches one bit an element of its mask.

    Output and gradient are those of Flax's layer, bit for bit.
    """

    def __call__(
        self,
        inputs: Float[Array, "*shape"],
        *,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | Array | None = None,
    ) -> Float[Array, "*shape"]:
        """Drops elements at random, unless it is deterministic."""
        still = self.deterministic if deterministic is None else deterministic
        source = self.rngs if rngs is None else rngs
        x = jnp.asarray(inputs)
        # In Flax's order: `still` may be traced where the rate is 0.
        if (
            self.rate == 0.0
            or still is None
            or still
            or self.rate == 1.0
            or not isinstance(source, nnx.Rngs | nnx.RngStream | jax.Array)
            or not jnp.issubdtype(x.dtype, jnp.floating)
        ):
            # Which has nothing to draw, or an error to raise.
            return super().__call__(inputs, deterministic=deterministic, rngs=rngs)
        key = _key(source, self.rng_collection)
        return dropout(x, self.rate, key, broadcast_dims=tuple(self.broadcast_dims))


def _key(source: Any, collection: str) -> Array:
    if isinstance(source, nnx.Rngs):
        return source[collection]()
    return source() if isinstance(source, nnx.RngStream) else source
