import contextlib
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

import dropit_jax
from tests.dropit_jax import pullbacks, reference

_KEY = jax.random.key(3)


def _flax(x, rate, key, broadcast_dims=()):
    layer = nn.Dropout(rate, broadcast_dims, deterministic=False)
    return layer.apply({}, x, rng=key)


def _cached(fn, *args):
    _, pullback = jax.vjp(fn, *args)
    return sorted(leaf.nbytes for leaf in jax.tree.leaves(pullback))


class DropoutTest(parameterized.TestCase):
    @parameterized.parameters(
        ((), ()),
        ((7,), ()),
        ((3, 10), ()),
        ((2, 5, 16), (1,)),
        ((2, 5, 16), (0, -1)),
        ((2, 3, 3, 5), (1, 2)),
        ((4, 0), ()),
        ((2, 5, 16), (), "bfloat16"),
        ((2, 5, 16), (-1,), "bfloat16"),
        ((2, 5, 16), (), "float16"),
    )
    def test_is_flaxs_to_the_bit(self, shape, dims, dtype="float32"):
        x = reference.activation(0, shape, dtype)
        cotangent = reference.activation(1, shape, dtype)
        for rate in (0.3,) if dtype != "float32" else (0.3, 0.5):
            args = {"rate": rate, "key": _KEY, "broadcast_dims": dims}
            ours = functools.partial(dropit_jax.nn.dropout, **args)
            theirs = functools.partial(_flax, **args)
            actual = pullbacks.value_and_pullback(ours, x, cotangent)
            expected = pullbacks.value_and_pullback(theirs, x, cotangent)
            for a, b in zip(actual, expected, strict=True):
                reference.assert_same_bits(a, b)

    @parameterized.parameters(0.0, 1.0)
    def test_rates_that_draw_nothing(self, rate):
        x = jnp.asarray([1.0, jnp.nan, -2.0])
        actual = pullbacks.value_and_pullback(
            lambda x: dropit_jax.nn.dropout(x, rate, _KEY), x, x
        )
        expected = pullbacks.value_and_pullback(lambda x: _flax(x, rate, _KEY), x, x)
        for a, b in zip(actual, expected, strict=True):
            reference.assert_same_bits(a, b)
        self.assertEqual(_cached(lambda x: dropit_jax.nn.dropout(x, rate, _KEY), x), [])

    def test_takes_keys_of_both_kinds(self):
        x = jnp.ones((4, 8))
        raw = jax.random.key_data(_KEY)
        chex.assert_trees_all_equal(
            dropit_jax.nn.dropout(x, 0.5, raw), dropit_jax.nn.dropout(x, 0.5, _KEY)
        )

    @parameterized.parameters(
        ((4, 8, 8, 32), (), 4 * 8 * 8 * 32 // 8),
        ((4, 8, 8, 32), (1, 2), 4 * 32 // 8),
        ((4, 8, 32), (-1,), 4 * 1),  # a byte for the 8 of each sample
        ((5, 3), (), 5),
        ((), (), 1),
    )
    def test_caches_one_bit_for_each_element_of_the_mask(self, shape, dims, nbytes):
        def fn(x):
            return dropit_jax.nn.dropout(x, 0.5, _KEY, broadcast_dims=dims)

        self.assertEqual(sum(_cached(fn, jnp.ones(shape))), nbytes)

    @parameterized.parameters(
        (jnp.ones(3, int), 0.5, (), TypeError, "floating-point arrays, got int32"),
        (jnp.ones(3), 1.5, (), ValueError, r"\[0, 1\], got 1.5"),
        (jnp.ones(3), -0.1, (), ValueError, r"\[0, 1\], got -0.1"),
        (jnp.ones(3), 0.5, (1,), ValueError, r"broadcast_dims=\(1,\).*\(3,\)"),
        (jnp.ones(3), 0.5, (-2,), ValueError, r"broadcast_dims=\(-2,\).*\(3,\)"),
    )
    def test_what_is_refused(self, x, rate, dims, error, message):
        jaxtyping.config.update("jaxtyping_disable", True)  # they are checked first
        self.addCleanup(jaxtyping.config.update, "jaxtyping_disable", False)
        with pytest.raises(error, match=message):
            dropit_jax.nn.dropout(x, rate, _KEY, broadcast_dims=dims)


class TransformationsTest(parameterized.TestCase):
    @parameterized.parameters((), (1,))
    def test_gradients_are_those_of_flax(self, *dims):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 16)), jnp.float32)
        keys = jax.random.split(_KEY, 4)

        def loss(fn, x, key):
            return jnp.sum(fn(x, 0.4, key, broadcast_dims=dims) ** 2)

        ours, theirs = (
            functools.partial(loss, fn) for fn in (dropit_jax.nn.dropout, _flax)
        )

        def scanned(x, keys):
            def body(total, args):
                return total + ours(*args), None

            return jax.lax.scan(body, 0.0, (x, keys))[0]

        @jax.jit
        def gradients(x, keys):
            return (
                jax.vmap(jax.grad(theirs))(x, keys),
                jax.vmap(jax.grad(ours))(x, keys),
                jax.vmap(jax.grad(jax.checkpoint(ours)))(x, keys),
                jax.lax.map(lambda args: jax.grad(ours)(*args), (x, keys)),
                jax.grad(scanned)(x, keys),
            )

        expected, *actual = gradients(x, keys)
        for gradient in actual:
            chex.assert_trees_all_close(gradient, expected, rtol=1e-6)

    def test_second_derivatives_are_flaxs(self):
        x = jnp.asarray([0.5, -1.5, 2.0, 3.0])

        def cubed(fn):
            return lambda x: jnp.sum(fn(x, 0.5, _KEY) ** 3)

        ours = cubed(dropit_jax.nn.dropout)
        expected = jax.jit(jax.hessian(cubed(_flax)))(x)
        for second in (jax.hessian(ours), jax.jacrev(jax.grad(ours))):
            chex.assert_trees_all_close(jax.jit(second)(x), expected, rtol=1e-6)

    @parameterized.product(
        axis_type=(AxisType.Auto, AxisType.Explicit), dims=((), (1,), (-1,))
    )
    def test_on_a_mesh_nothing_moves(self, axis_type, dims):
        axes = ("data", "model")
        mesh = jax.make_mesh((4, 2), axes, axis_types=(axis_type,) * 2)
        x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 5, 32)), jnp.float32)

        def loss(x):
            y = dropit_jax.nn.dropout(x, 0.5, _KEY, broadcast_dims=dims)
            return jnp.sum(jnp.sin(y))

        gradient = jax.jit(jax.grad(loss))
        expected = jax.device_get(gradient(x))
        with jax.set_mesh(mesh):
            sharded = jax.device_put(x, PartitionSpec("data", None, "model"))
            compiled = gradient.lower(sharded).compile()
            self.assertNotRegex(compiled.as_text(), "all-|collective|reduce-scatter")
            actual = jax.device_get(compiled(sharded))
        chex.assert_trees_all_close(actual, expected, rtol=1e-6)


class TracedTest(parameterized.TestCase):
    """`deterministic` as an array, as `flax.linen.remat` makes it.

    Flax looks at the rate first, and never at it where nothing is dropped.
    """

    @parameterized.parameters(nn, dropit_jax.linen)
    def test_nothing_is_dropped_in_linen(self, layers):
        x = jnp.arange(12.0).reshape(3, 4)

        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, deterministic):
                return layers.Dropout(0.0)(jnp.sin(x), deterministic=deterministic)

        block = nn.remat(Block)()
        for preset in (None, "dropit"):
            context = contextlib.nullcontext()
            if preset is not None:
                context = dropit_jax.linen.intercept(preset)
            with context:
                dropped = jax.jit(lambda x, still: block.apply({}, x, still))(x, False)
            chex.assert_trees_all_close(dropped, jnp.sin(x), rtol=1e-6)

    def test_nothing_is_dropped_in_nnx(self):
        x = jnp.arange(12.0).reshape(3, 4)
        for layers in (nnx, dropit_jax.nnx):
            layer = layers.Dropout(0.0)
            run = jax.jit(lambda x, still, f=layer: f(x, deterministic=still))
            chex.assert_trees_all_equal(run(x, False), x)

    def test_with_a_rate_it_is_flaxs_error(self):
        x = jnp.ones((3, 4))
        for layers in (nn, dropit_jax.linen):
            layer = layers.Dropout(1.0)
            run = jax.jit(lambda x, still, f=layer: f.apply({}, x, deterministic=still))
            with pytest.raises(jax.errors.TracerBoolConversionError):
                run(x, False)


class NamesTest(parameterized.TestCase):
    """The names of what functions cache, for the policies of `jax.checkpoint`."""

    @parameterized.parameters(
        ("relu", dropit_jax.nn.relu, 128 // 8),
        ("relu6", dropit_jax.nn.relu6, 128 // 8),
        ("leaky_relu", dropit_jax.nn.leaky_relu, 128 // 8),
        ("gelu", dropit_jax.nn.gelu, 128),
        ("silu", dropit_jax.nn.silu, 128),
        ("tanh", dropit_jax.nn.tanh, 128),
        ("sigmoid", dropit_jax.nn.sigmoid, 128),
        ("dropout", lambda x: dropit_jax.nn.dropout(x, 0.5, _KEY), 128 // 8),
    )
    def test_a_policy_can_save_it_and_nothing_else(self, name, fn, nbytes):
        def scaled(x):
            return fn(2 * x)

        x = jnp.ones((4, 32))
        save = jax.checkpoint_policies.save_only_these_names
        saved = jax.checkpoint(scaled, policy=save(name))
        self.assertEqual(_cached(saved, x), [nbytes])
        others = jax.checkpoint(scaled, policy=save("others"))
        self.assertNotIn(nbytes, _cached(others, x))
        gradients = [jax.grad(lambda x, f=f: f(x).sum())(x) for f in (saved, scaled)]
        chex.assert_trees_all_equal(*gradients)


if __name__ == "__main__":
    absltest.main()
