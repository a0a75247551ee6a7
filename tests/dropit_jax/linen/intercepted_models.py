"""The tests of `intercept` run these models."""

from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dropit_jax import DropIT, memory

POLICY = DropIT(0.5)
OTHER = DropIT(0.75)

# Of 96 float32: the kept ones and a bitmap, or two for each byte of it.
BYTES, OTHER_BYTES = 4 * 48 + 12, 4 * 24 + 12


def numbers(*shape):
    x = np.random.default_rng(0).normal(size=shape)
    return jnp.asarray(np.round(x, 1), jnp.float32)  # with ties


X = numbers(6, 16)


def shapes_of(model, x=X):
    return jax.eval_shape(model.init, jax.random.key(0), x)


def variables_of(model, x=X):
    """Faster than to compile the initialisation."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape), s.dtype),
        shapes_of(model, x),
    )


def runner(model):
    """Output, and the gradients of the parameters, as a flat dict, and of the input."""

    @jax.jit
    def run(variables, x, rngs):
        out, pullback = jax.vjp(lambda v, x: model.apply(v, x, rngs=rngs), variables, x)
        cotangent = jnp.cos(jnp.arange(out.size)).reshape(out.shape)
        return out, *pullback(cotangent.astype(out.dtype))

    def flat(variables, x=X, rngs=None):
        out, of_variables, of_x = run(variables, x, rngs)
        params = flax.traverse_util.flatten_dict(of_variables["params"], sep="/")
        return out, params, of_x

    return flat


def run_model(model, *args, **kwargs):
    return runner(model)(*args, **kwargs)


def gradient_of(model, x=X, **kwargs):
    return jax.grad(lambda v: model.apply(v, x, **kwargs).astype(jnp.float32).sum())


def bytes_cached(model, x=X, **kwargs):
    """Returns the bytes that the program of the gradient caches."""
    return memory.cached_bytes(gradient_of(model, x, **kwargs), shapes_of(model, x))


def changed(actual, expected):
    """Returns the paths of the layers whose kernel has another gradient."""
    return {
        path.removesuffix("/kernel")
        for path, gradient in expected.items()
        if path.endswith("kernel") and not np.array_equal(actual[path], gradient)
    }


def paths_of(report):
    return [layer.path for layer in report.layers]


class OneLayer(nn.Module):
    """A layer that is not the first."""

    layer: Any

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(x.shape[-1], name="first")(x))
        return self.layer(name="layer")(x)


class Block(nn.Module):
    dense: Any = nn.Dense

    @nn.compact
    def __call__(self, x, _=None):
        return nn.tanh(self.dense(16, name="dense")(x)), None


class Compact(nn.Module):
    dense: Any = nn.Dense

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(16, name="first")(x))
        x = nn.tanh(self.dense(16, name="second")(x))
        return self.dense(4, name="third")(x)


class Setup(nn.Module):
    """Its layers are made in another order than they are called in."""

    dense: Any = nn.Dense

    def setup(self):
        self.last = self.dense(4)
        self.between = [self.dense(16), self.dense(16)]
        self.first = nn.Dense(16)

    def __call__(self, x):
        return self.last(self.decode(nn.tanh(self.first(x))))

    def decode(self, x):
        return self.between[1](nn.tanh(self.between[0](x)))


class Lifted(nn.Module):
    """Both modules are in `lift`, or the second alone."""

    block: Any
    dense: Any = nn.Dense
    first: Any = Block

    @nn.compact
    def __call__(self, x):
        x, _ = self.first(name="first")(x, None)
        x, _ = self.block(self.dense, name="second")(x, None)
        return x


LIFTED = {
    "submodule": Block,
    "scan": nn.scan(
        Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    ),
    "remat": nn.remat(Block),
    "vmap": nn.vmap(
        Block,
        in_axes=(0, None),
        out_axes=(0, None),
        variable_axes={"params": None},
        split_rngs={"params": False},
    ),
    "jit": nn.jit(Block),
}
ATTENTION = nn.MultiHeadDotProductAttention
