"""`drop` on losses of models of each framework, written as their users write them.

JAX's derivative of the plain loss is the truth.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import chex
import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized
from flax import linen, nnx

from dropit_jax import drop, memory, plan

_RNG = np.random.default_rng(0)
_CLASSES = 4
_WIDTH = 16
_DEPTH = 2
_IMAGES = jnp.asarray(_RNG.normal(size=(8, 8, 8, 4)), jnp.float32)
_TOKENS = jnp.asarray(_RNG.normal(size=(8, 8, _WIDTH)), jnp.float32)
_LABELS = jnp.arange(8) % _CLASSES
_KEY = jax.random.key(1)


def _cross_entropy(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, _LABELS).mean()


def _filled(shapes):
    """Arrays of these shapes: the initialisers would take seconds to compile."""
    rng = np.random.default_rng(0)

    def fill(leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.split(_KEY, leaf.shape)
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jnp.zeros(leaf.shape, leaf.dtype)
        return jnp.asarray(rng.normal(scale=0.3, size=leaf.shape), leaf.dtype)

    return jax.tree.map(fill, shapes)


def _same(function):
    return function


# Each case returns a loss, with `wrap` around it or around the model in it, and its
# arguments, the first of which is differentiated.

# Flax linen


class _LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        y = linen.silu(linen.Dense(4 * _WIDTH)(x))
        y = linen.Dropout(0.1, deterministic=False)(y)
        return x + linen.Dense(_WIDTH)(y), None


class _LinenStack(linen.Module):
    """A loop over blocks that are computed again."""

    @linen.compact
    def __call__(self, x, *, train):
        x = linen.Conv(_WIDTH, (3,), use_bias=False)(x)
        x = linen.relu(linen.BatchNorm(use_running_average=not train)(x))
        stack = linen.scan(
            linen.remat(_LinenBlock, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=_DEPTH,
        )
        x, _ = stack()(x, None)
        return linen.Dense(_CLASSES)(x.mean(axis=1))


def linen_stack(wrap):
    model = _LinenStack()
    init = functools.partial(model.init, train=False)
    variables = _filled(
        jax.eval_shape(init, {"params": _KEY, "dropout": _KEY}, _TOKENS)
    )

    def loss(params, batch_stats, tokens, key):
        logits, updates = wrap(model.apply)(
            {"params": params, "batch_stats": batch_stats},
            tokens,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        return _cross_entropy(logits), (logits, updates["batch_stats"])

    return loss, (variables["params"], variables["batch_stats"], _TOKENS, _KEY)


# Flax nnx: modules are taken apart before the loss, and put together in it.


class _NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(_WIDTH, 4 * _WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.outer = nnx.Linear(4 * _WIDTH, _WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + self.outer(self.dropout(nnx.silu(self.inner(x))))


class _NnxStack(nnx.Module):
    """A loop over blocks that are computed again."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=_DEPTH)
        @nnx.vmap
        def blocks(rngs):
            return _NnxBlock(rngs)

        self.norm = nnx.BatchNorm(_WIDTH, rngs=rngs)
        self.blocks = blocks(rngs)
        self.head = nnx.Linear(_WIDTH, _CLASSES, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def stack(block, x):
            return nnx.remat(_NnxBlock.__call__)(block, x)

        return self.head(stack(self.blocks, self.norm(x)).mean(axis=1))


def nnx_stack(wrap):
    def init():
        return nnx.split(_NnxStack(nnx.Rngs(_KEY)), nnx.Param, ...)

    graph, params, rest = _filled(jax.eval_shape(init))

    def loss(params, rest, graph, tokens):
        model = nnx.merge(graph, params, rest, copy=True)
        logits = model(tokens)
        return _cross_entropy(logits), (logits, nnx.state(model, nnx.Not(nnx.Param)))

    return wrap(loss), (params, rest, graph, _TOKENS)


# Equinox: modules are pytrees, with functions and numbers among their leaves.


class _EqxConvNet(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    pool: eqx.nn.MaxPool2d
    head: eqx.nn.Linear
    activation: Callable[..., Any]

    def __init__(self, key):
        keys = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(4, _WIDTH, 3, padding=1, use_bias=False, key=keys[0])
        self.norm = eqx.nn.BatchNorm(_WIDTH, "batch", mode="batch")
        self.pool = eqx.nn.MaxPool2d(2, 2)
        self.head = eqx.nn.Linear(4 * 4 * _WIDTH, _CLASSES, key=keys[1])
        self.activation = jax.nn.relu

    def __call__(self, x, state):
        x, state = self.norm(self.conv(x), state)
        return self.head(self.pool(self.activation(x)).reshape(-1)), state


class _EqxBlock(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    outer: eqx.nn.Linear
    activation: Callable[..., Any]

    def __init__(self, key):
        keys = jax.random.split(key)
        self.attention = eqx.nn.MultiheadAttention(2, _WIDTH, key=keys[0])
        self.outer = eqx.nn.Linear(_WIDTH, _WIDTH, key=keys[1])
        self.activation = jax.nn.silu

    def __call__(self, x):
        y = self.activation(self.attention(x, x, x))
        return x + jax.vmap(self.outer)(y)


class _EqxStack(eqx.Module):
    """A loop over blocks that are computed again."""

    blocks: _EqxBlock
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, _DEPTH + 1)
        self.blocks = eqx.filter_vmap(_EqxBlock)(keys[1:])
        self.head = eqx.nn.Linear(_WIDTH, _CLASSES, key=keys[0])

    def __call__(self, x):
        arrays, others = eqx.partition(self.blocks, eqx.is_array)

        def turn(x, arrays):
            return eqx.filter_checkpoint(eqx.combine(arrays, others))(x), None

        x, _ = jax.lax.scan(turn, x, arrays)
        return self.head(x.mean(axis=0))


def eqx_convnet(wrap):
    make = eqx.nn.make_with_state(_EqxConvNet)
    model, state = _filled(eqx.filter_eval_shape(make, _KEY))

    @eqx.filter_jit
    def loss(model, state, images):
        of_batch = jax.vmap(model, (0, None), (0, None), axis_name="batch")
        logits, state = of_batch(images, state)
        return _cross_entropy(logits), (logits, state)

    return wrap(loss), (model, state, jnp.moveaxis(_IMAGES, -1, 1))


def eqx_stack(wrap):
    model = _filled(eqx.filter_eval_shape(_EqxStack, _KEY))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params, tokens):
        logits = jax.vmap(wrap(eqx.combine(params, static)))(tokens)
        return _cross_entropy(logits), logits

    return loss, (params, _TOKENS)


# Haiku


def _haiku_block(x):
    y = jax.nn.silu(hk.Linear(4 * _WIDTH)(x))
    return x + hk.Linear(_WIDTH)(hk.dropout(hk.next_rng_key(), 0.1, y))


def _haiku_stack(x):
    """A loop over blocks that are computed again."""
    x = hk.BatchNorm(True, True, 0.9)(x, is_training=True)
    x = hk.layer_stack(_DEPTH)(hk.remat(_haiku_block))(x)
    return hk.Linear(_CLASSES)(x.mean(axis=1))


def haiku_stack(wrap):
    model = hk.transform_with_state(_haiku_stack)
    params, state = _filled(jax.eval_shape(model.init, _KEY, _TOKENS))

    def loss(params, state, key, tokens):
        logits, state = model.apply(params, state, key, tokens)
        return _cross_entropy(logits), (logits, state)

    return wrap(loss), (params, state, _KEY, _TOKENS)


# JAX alone


def plain_mlp(wrap):
    sizes = (_WIDTH, 64, 64, _CLASSES)
    shapes = [
        {
            "w": jax.ShapeDtypeStruct((inputs, outputs), jnp.float32),
            "b": jax.ShapeDtypeStruct((outputs,), jnp.float32),
        }
        for inputs, outputs in itertools.pairwise(sizes)
    ]

    def loss(params, x):
        *hidden, head = params
        for layer in hidden:
            x = jax.nn.gelu(x @ layer["w"] + layer["b"])
        logits = x @ head["w"] + head["b"]
        return _cross_entropy(logits), logits

    return wrap(loss), (_filled(shapes), _TOKENS[:, 0])


# How users of each framework differentiate and compile.
_JAX = (jax.jit, jax.value_and_grad)
_EQX = (eqx.filter_jit, eqx.filter_value_and_grad)
_CASES = (
    (linen_stack, *_JAX),
    (nnx_stack, *_JAX),
    (eqx_convnet, *_EQX),
    (eqx_stack, *_EQX),
    (haiku_stack, *_JAX),
    (plain_mlp, *_JAX),
)

# Compiles in a third of the time.
_FAST = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}

# The largest errors of a parameter's gradient; four bits are beyond them.
_BOUNDS = {"exact": 1e-5, "lean": 0.03}


def _numbers(tree):
    """The arrays among the leaves, keys as their words."""

    def number(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    return [number(leaf) for leaf in jax.tree.leaves(tree) if eqx.is_array(leaf)]


def _error(found, expected):
    """The largest error of a gradient, of its norm or a hundredth of that of all."""
    least = np.linalg.norm([np.linalg.norm(leaf) for leaf in expected]) / 100
    return max(
        np.linalg.norm(one - other) / max(np.linalg.norm(other), least)
        for one, other in zip(found, expected, strict=True)
    )


class FrameworkTest(parameterized.TestCase):
    @parameterized.parameters(*_CASES)
    def test_gradients_and_state(self, case, jit, value_and_grad):
        loss, args = case(_same)
        functions = [loss]
        for preset in _BOUNDS:
            function, _ = case(functools.partial(drop, preset=preset))
            functions.append(function)

        @functools.partial(jit, compiler_options=_FAST)
        def run(*args):
            return [value_and_grad(f, has_aux=True)(*args) for f in functions]

        (results, gradients), *dropped = run(*args)
        for preset, (found_results, found) in zip(_BOUNDS, dropped, strict=True):
            chex.assert_trees_all_equal_structs(found_results, results)
            chex.assert_trees_all_equal_shapes_and_dtypes(found, gradients)
            chex.assert_trees_all_close(
                _numbers(found_results), _numbers(results), rtol=1e-5, atol=1e-6
            )
            error = _error(_numbers(found), _numbers(gradients))
            self.assertLess(error, _BOUNDS[preset], preset)

    @parameterized.parameters(*_CASES)
    def test_less_is_stored(self, case, *_):
        loss, args = case(_same)
        arrays, others = eqx.partition(args[0], eqx.is_inexact_array)
        dropped = drop(loss)
        planned = plan(dropped)(*args)
        self.assertLess(planned.nbytes, planned.plain_bytes)
        kept = memory.saved_residuals(
            lambda arrays: dropped(eqx.combine(arrays, others), *args[1:])[0], arrays
        )
        self.assertEqual(planned.nbytes, kept.total_bytes)


class TrainingTest(parameterized.TestCase):
    def test_losses_of_an_optax_loop(self):
        plain_loss, (params, x) = plain_mlp(_same)
        optimizer = optax.adam(3e-3)

        def losses(loss, params):
            def step(carry, _):
                params, state = carry
                (value, _), gradients = jax.value_and_grad(loss, has_aux=True)(
                    params, x
                )
                updates, state = optimizer.update(gradients, state, params)
                return (optax.apply_updates(params, updates), state), value

            carry = params, optimizer.init(params)
            return jax.lax.scan(step, carry, length=10)[1]

        @functools.partial(jax.jit, compiler_options=_FAST)
        def run(params):
            dropped = [drop(plain_loss, preset) for preset in ("exact", "lean")]
            return [losses(loss, params) for loss in (plain_loss, *dropped)]

        plain, exact, lean = run(params)
        self.assertLess(plain[-1], 0.5 * plain[0])
        np.testing.assert_allclose(exact, plain, rtol=1e-5)
        np.testing.assert_allclose(lean, plain, rtol=0.01)


if __name__ == "__main__":
    absltest.main()
