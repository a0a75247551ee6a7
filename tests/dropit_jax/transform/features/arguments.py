"""Arguments of the functions, and a network of a few layers."""

import jax.numpy as jnp
import numpy as np

_RNG = np.random.default_rng(0)
PARAMS = {
    "w": jnp.asarray(_RNG.normal(size=(3, 16, 16)) / 4, jnp.float32),
    "b": jnp.asarray(_RNG.normal(size=(3, 16)) / 4, jnp.float32),
}
X = jnp.asarray(_RNG.normal(size=(8, 16)), jnp.float32)


def layer(x, w, b):
    return jnp.tanh(x @ w + b)


def mlp(params, x):
    for w, b in zip(params["w"], params["b"], strict=True):
        x = layer(x, w, b)
    return jnp.sum(x**2)
