"""The arguments of the functions."""

import jax.numpy as jnp
import numpy as np

_RNG = np.random.default_rng(0)
PARAMS = {
    "w": jnp.asarray(_RNG.normal(size=(3, 16, 16)) / 4, jnp.float32),
    "b": jnp.asarray(_RNG.normal(size=(3, 16)) / 4, jnp.float32),
}
X = jnp.asarray(_RNG.normal(size=(8, 16)), jnp.float32)
