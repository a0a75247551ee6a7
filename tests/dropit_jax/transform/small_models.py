"""Losses of small models of which the layers are alike, and large beside all else."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

ROWS, WIDTH = 4096, 128
_SQUARE = (WIDTH, WIDTH)


def _stacked(layer, *shapes):
    """The loss of layers one after the other, and the shapes of a layer's weights."""

    def loss(params, x):
        for i in range(len(params[0])):
            x = layer(x, *(p[i] for p in params))
        return jnp.mean(x.astype(jnp.float32) ** 2)

    return loss, shapes


def _gated(function):
    def layer(x, up, gate, down):
        return x + ((x @ up) * function(x @ gate)) @ down

    wide = (WIDTH, 2 * WIDTH)
    return _stacked(layer, wide, wide, wide[::-1])


def _mlp(function):
    return _stacked(lambda x, w, v: x + function(x @ w) @ v, _SQUARE, _SQUARE)


def _norm(x):
    mean = jnp.mean(x, -1, keepdims=True)
    variance = jnp.mean((x - mean) ** 2, -1, keepdims=True)
    return (x - mean) * lax.rsqrt(variance + 1e-6)


def _attention():
    heads = 4

    def layer(x, query, key, value, out):
        split = (-1, 64, heads, WIDTH // heads)
        q, k, v = ((x @ w).reshape(split) for w in (query, key, value))
        scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", scores, v)
        return x + mixed.reshape(x.shape) @ out

    return _stacked(layer, *[_SQUARE] * 4)


def _recurrent():
    def loss(params, x):
        def turn(x, slices):
            w, v = slices
            return jnp.tanh(x @ w) @ v, None

        y, _ = lax.scan(turn, x, params)
        return jnp.mean(y**2)

    return loss, (_SQUARE, _SQUARE)


def _dropout(x, w, v):
    kept = jax.random.bernoulli(jax.random.key(0), 0.9, x.shape)
    return x + jnp.where(kept, jax.nn.relu(x @ w) / 0.9, 0) @ v


def _pooled(x, w, v):
    y = jax.nn.silu(x @ w).reshape(ROWS // 64, 8, 8, WIDTH)
    y = lax.reduce_window(y, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
    return x + y.reshape(x.shape) @ v


X = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
MODELS = {
    "attention": _attention(),
    "dropout": _stacked(_dropout, _SQUARE, _SQUARE),
    "geglu": _gated(jax.nn.gelu),
    "gelu": _mlp(jax.nn.gelu),
    "normalised": _stacked(
        lambda x, w, v: x + jax.nn.gelu(_norm(x) @ w) @ v, _SQUARE, _SQUARE
    ),
    "pooled": _stacked(_pooled, _SQUARE, _SQUARE),
    "recurrent": _recurrent(),
    "relu": _mlp(jax.nn.relu),
    "sigmoid_gate": _gated(jax.nn.sigmoid),
    "squared_relu": _mlp(lambda x: jax.nn.relu(x) ** 2),
    "swiglu": _gated(jax.nn.silu),
    "tanh": _mlp(jnp.tanh),
    "leaky": _mlp(functools.partial(jax.nn.leaky_relu, negative_slope=0.2)),
}


def parameters(shapes, layers):
    """The types of the parameters of so many layers."""
    return tuple(
        jax.ShapeDtypeStruct((layers, *shape), jnp.float32) for shape in shapes
    )
