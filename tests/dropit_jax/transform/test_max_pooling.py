import functools
import math

import chex
import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from dropit_jax.transform.tracing import max_pooling
from tests.dropit_jax import pullbacks, reference

# (inputs, window, strides, padding)
_CASES = (
    ((2, 6, 6, 3), (2, 2), (2, 2), "VALID"),
    ((2, 7, 6, 4), (3, 3), (2, 2), "SAME"),
    ((2, 7, 6, 4), (3, 3), None, "SAME"),
    ((1, 7, 7, 2), (3, 3), (2, 2), ((1, 1), (1, 1))),
    ((2, 9, 3), (3,), (2,), ((2, 1),)),
    ((9, 2), (3,), None, "SAME_LOWER"),
    ((9, 2), (2,), (3,), "valid"),
    ((1, 12, 12, 1), (5, 4), (2, 3), ((0, 3), (5, 0))),
    ((2, 3, 4, 5, 2), (2, 3, 2), (1, 2, 1), "SAME"),
    ((2, 2, 6, 4), (3,), (1,), "SAME"),
    ((2, 3), (), (), "VALID"),
    ((1, 3, 2), (5,), (1,), "VALID"),
    ((1, 0, 2), (2,), (2,), "SAME"),
)


def _max_pool(inputs, window_shape, strides=None, padding="VALID"):
    """The rule with the arguments of `flax.linen.max_pool`."""
    shape, strides = tuple(window_shape), strides or (1,) * len(window_shape)
    batch = (1,) * (inputs.ndim - len(shape) - 1)
    if isinstance(padding, str):
        spatial = inputs.shape[len(batch) : -1]
        padding = jax.lax.padtype_to_pads(spatial, shape, strides, padding)
    none = ((0, 0),)
    return max_pooling.largest_of_windows(
        inputs,
        (*batch, *shape, 1),
        (*batch, *strides, 1),
        (*none * len(batch), *padding, *none),
    )


def _assert_is_flaxs(x, *args, seed=1):
    ours, theirs = (
        functools.partial(lambda fn, x: fn(x, *args), fn)
        for fn in (_max_pool, nn.max_pool)
    )
    shape = jax.eval_shape(theirs, x).shape
    cotangent = jnp.nan_to_num(reference.activation(seed, shape, x.dtype), posinf=9)
    actual = pullbacks.value_and_pullback(ours, x, cotangent)
    expected = pullbacks.value_and_pullback(theirs, x, cotangent)
    for a, b in zip(actual, expected, strict=True):
        reference.assert_same_bits(a, b)


class MaxPoolTest(parameterized.TestCase):
    @parameterized.parameters(
        *((case, "float32") for case in _CASES),
        *((case, "bfloat16") for case in _CASES[:2]),
        *((case, "float16") for case in _CASES[3:4]),
    )
    def test_is_flaxs_to_the_bit(self, case, dtype):
        shape, *args = case
        _assert_is_flaxs(reference.activation(0, shape, dtype), *args)

    @parameterized.parameters(
        ((1, 20, 20, 2), (5, 5), (4, 4), "SAME"), ((1, 300, 1), (257,), (9,), "SAME")
    )
    def test_large_windows(self, shape, *args):
        _assert_is_flaxs(reference.activation(0, shape), *args)

    @hypothesis.given(
        row=st.lists(
            st.sampled_from([0.0, -0.0, 1.0, np.nan, np.inf, -np.inf]),
            min_size=8,
            max_size=8,
        ),
        seed=st.integers(0, 9),
    )
    def test_ties_infinities_and_nan(self, row, seed):
        x = jnp.asarray(row, jnp.float32).reshape(8, 1)
        ours, theirs = _FIXED
        cotangent = np.random.default_rng(seed).normal(size=(5, 1)).astype(np.float32)
        for a, b in zip(ours(x, cotangent), theirs(x, cotangent), strict=True):
            reference.assert_same_bits(a, b)

    def test_windows_of_one_element(self):
        x = jnp.arange(5.0).reshape(5, 1)
        args = ((1,), (2,))
        actual = jax.grad(lambda x: (_max_pool(x, *args) ** 2).sum())(x)
        self.assertEqual(actual.ravel().tolist(), [0, 0, 4, 0, 8])

    @parameterized.parameters(
        ((4, 8, 8, 32), (2, 2), 4 * 4 * 4 * 32 // 2),  # 4 bits
        ((4, 8, 8, 32), (4, 4), 4 * 2 * 2 * 32 // 2),
        ((4, 10, 10, 32), (5, 5), 4 * 2 * 2 * 32),  # 8 bits
        ((2, 6, 6, 3), (2, 2), 2 * math.ceil(3 * 3 * 3 / 2)),  # whole bytes a sample
        ((2, 257, 3), (257,), 2 * 3 * 2),  # 16 bits
        ((2, 257, 3), (256,), 2 * 3),
    )
    def test_caches_one_place_for_each_window(self, shape, window, nbytes):
        def pullback(x):
            pool = functools.partial(_max_pool, window_shape=window, strides=window)
            return jax.vjp(pool, x)[1]

        leaves = jax.tree.leaves(jax.eval_shape(pullback, jnp.ones(shape)))
        cached = [leaf.size * leaf.dtype.itemsize for leaf in leaves]
        self.assertEqual(cached, [nbytes])


def _fixed(fn):
    @jax.jit
    def run(x, cotangent):
        y, pullback = jax.vjp(lambda x: fn(x, (3,), (2,), ((1, 2),)), x)
        return y, *pullback(cotangent)

    return run


_FIXED = _fixed(_max_pool), _fixed(nn.max_pool)


class TransformationsTest(parameterized.TestCase):
    def _inputs(self, *shape):
        x = np.random.default_rng(0).normal(size=shape).round(1)
        return jnp.asarray(x, jnp.float32)

    def test_gradients_are_those_of_flax(self):
        x = self._inputs(3, 2, 6, 6, 4)

        def loss(fn, x):
            return jnp.sum(fn(x, (3, 3), (2, 2), "SAME") ** 2)

        ours, theirs = (functools.partial(loss, fn) for fn in (_max_pool, nn.max_pool))

        def scanned(x):
            return jax.lax.scan(lambda s, x: (s + ours(x), None), 0.0, x)[0]

        @jax.jit
        def gradients(x):
            last = jax.vmap(jax.grad(ours), in_axes=3)(jnp.moveaxis(x, 0, 3))
            return (
                jax.vmap(jax.grad(theirs))(x),
                jax.vmap(jax.grad(ours))(x),
                last,
                jax.grad(lambda x: jax.checkpoint(jax.vmap(ours))(x).sum())(x),
                jax.grad(scanned)(x),
            )

        expected, *actual = gradients(x)
        for gradient in actual:
            chex.assert_trees_all_close(gradient, expected, rtol=1e-6)

    def test_second_derivatives_are_flaxs(self):
        x = self._inputs(7, 1)

        def cubed(fn):
            return lambda x: jnp.sum(fn(x, (3,), (2,)) ** 3)

        ours = cubed(_max_pool)
        expected = jax.jit(jax.hessian(cubed(nn.max_pool)))(x)
        for second in (jax.hessian(ours), jax.jacrev(jax.grad(ours))):
            chex.assert_trees_all_close(jax.jit(second)(x), expected, rtol=1e-6)

    def test_a_policy_can_save_the_places_and_nothing_else(self):
        policy = jax.checkpoint_policies.save_only_these_names("max_pool")

        @functools.partial(jax.checkpoint, policy=policy)
        def scaled(x):
            return _max_pool(2 * x, (2,), (2,))

        _, pullback = jax.vjp(scaled, jnp.ones((3, 4, 8)))
        cached = [leaf.nbytes for leaf in jax.tree.leaves(pullback)]
        self.assertEqual(cached, [3 * 2 * 8 // 2])

    @parameterized.parameters((AxisType.Auto, 16), (AxisType.Explicit, 3))
    def test_on_a_mesh_nothing_moves(self, axis_type, channels):
        axes = ("data", "model")
        mesh = jax.make_mesh((4, 2), axes, axis_types=(axis_type,) * 2)
        x = self._inputs(8, 5, 6, channels)
        spec = PartitionSpec("data", None, None, "model" if channels == 16 else None)

        def loss(x):
            y = _max_pool(x, (3, 3), (2, 2), "SAME")
            return jnp.sum(jnp.sin(y))

        gradient = jax.jit(jax.grad(loss))
        expected = jax.device_get(gradient(x))
        with jax.set_mesh(mesh):
            sharded = jax.device_put(x, spec)
            compiled = gradient.lower(sharded).compile()
            self.assertNotRegex(compiled.as_text(), "all-|collective|reduce-scatter")
            actual = jax.device_get(compiled(sharded))
        chex.assert_trees_all_close(actual, expected, rtol=1e-6)


if __name__ == "__main__":
    absltest.main()
