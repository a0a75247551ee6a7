"""Models, and what the tests of presets in `linen.intercept` do with them."""

import dataclasses
import functools
import math
import types
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.extend.core import Var
from jax.nn import gelu

from dropit_jax import DropIT, layer_presets

# What one of the transformers is made of; Flax has announced the end of it.
pytestmark = pytest.mark.filterwarnings("ignore:SelfAttention will be deprecated")
EXACT = DropIT(0.0)
LEAN = layer_presets.layer_preset("lean")
# Without the error of the products.
LEAN_EXACT = dataclasses.replace(LEAN, dropit=EXACT, conv=EXACT)
BITS_EXACT = dataclasses.replace(LEAN_EXACT, eight_bit=False)
ONLY_CODES = dataclasses.replace(LEAN, dropit=None, conv=None)
# A table of functions, as models have them.
TABLE = {"exact": functools.partial(nn.gelu, approximate=False), "relu": nn.relu}


def numbers(*shape, dtype=jnp.float32):
    x = np.random.default_rng(0).normal(size=shape)
    return jnp.asarray(np.round(x, 1), dtype)  # with ties


X = numbers(4, 16)
CODES = X.size  # of it, a byte an element
BITS = X.size // 8


class Convolutional(nn.Module):
    activation: Any = nn.relu

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), name="stem")(x)
        x = nn.BatchNorm(use_running_average=False, name="norm")(x)
        x = nn.max_pool(self.activation(x), (2, 2), (2, 2))
        x = nn.relu(nn.Conv(16, (3, 3), name="conv")(x))
        x = nn.Dropout(0.5, deterministic=False, name="drop")(x)
        return nn.Dense(4, name="head")(x.mean((1, 2)))


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, name="embed")(x)
        y = nn.LayerNorm(name="norm_1")(x)
        y = nn.MultiHeadDotProductAttention(
            2, dropout_rate=0.1, deterministic=False, name="mix"
        )(y)
        x = x + nn.Dropout(0.1, deterministic=False, name="drop")(y)
        y = gelu(nn.Dense(32, name="up")(nn.RMSNorm(name="norm_2")(x)))
        return x + nn.Dense(16, name="down")(y)


RNGS = {"dropout": jax.random.key(1), "dropit": jax.random.key(2)}


def init(model, x):
    return model.init({"params": jax.random.key(0), **RNGS}, x)


def variables(model, shape=(4, 16)):
    """Faster than to compile the initialisation."""
    rng = np.random.default_rng(1)
    rngs = {"params": jax.random.key(0), **RNGS}
    shapes = jax.eval_shape(model.init, rngs, jnp.zeros(shape))
    return jax.tree.map(
        lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape) ** 2 + 0.1, s.dtype),
        shapes,
    )


def apply(model, variables, x, **kwargs):
    state = [name for name in variables if name != "params"]
    return model.apply(variables, x, rngs=RNGS, mutable=state, **kwargs)


def run(model, x, **kwargs):
    """Output, updates, and the gradients of parameters, by name, and input."""

    @jax.jit
    def run(variables, x):
        def loss(params, x):
            out = apply(model, variables | {"params": params}, x, **kwargs)
            weights = jnp.cos(jnp.arange(out[0].size)).reshape(out[0].shape)
            return (out[0] * weights).astype(jnp.float32).sum(), out

        gradient = jax.grad(loss, (0, 1), has_aux=True)
        gradients, out = gradient(variables["params"], x)
        return out, gradients

    out, (of_params, of_x) = run(variables(model, x.shape), x)
    of_params = flax.traverse_util.flatten_dict(of_params, sep="/")
    return out, {"x": of_x, **of_params}


def residual(function, *args):
    """What a pullback keeps that is no argument of the function, in bytes."""
    pullback = lambda *args: jax.vjp(function, *args)[1]  # noqa: E731
    jaxpr = jax.make_jaxpr(pullback)(*args).jaxpr
    kept = {v for v in jaxpr.outvars if isinstance(v, Var)} - set(jaxpr.invars)
    return sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in kept)


def cached(model, x=X, **kwargs):
    run = lambda variables, x: apply(model, variables, x, **kwargs)[0]  # noqa: E731
    return residual(run, variables(model, x.shape), x)


def kinds(report):
    return [layer.kind for layer in report.layers]


def is_untouched():
    return (
        type(jax.nn) is type(nn) is type(jnp) is types.ModuleType
        and nn.relu is jax.nn.relu
        and gelu is jax.nn.gelu
        and TABLE["relu"] is jax.nn.relu
        and type(TABLE["exact"].func) is types.FunctionType
    )


class PresetTestCase(parameterized.TestCase):
    def tearDown(self):
        super().tearDown()
        self.assertTrue(is_untouched())

    def assert_near(self, actual, expected, tolerance):
        """Gradients, relative to the largest of them."""
        scale = max(float(jnp.linalg.norm(g)) for g in expected.values())
        for name, gradient in expected.items():
            norm = max(float(jnp.linalg.norm(gradient)), 0.05 * scale)
            error = float(jnp.linalg.norm(actual[name] - gradient))
            self.assertLess(error, tolerance * norm, name)


class Dense(nn.Module):
    function: Any = nn.gelu

    @nn.compact
    def __call__(self, x):
        return self.function(nn.Dense(16, name="dense")(x))


# (model, shape of the input, what runs compact in "lean")
