import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import dropit_jax
from tests.dropit_jax import reference

_SHAPES = ((), (1,), (7,), (8,), (3, 10), (2, 3, 16), (2, 5, 5, 3), (4, 0))


def _value_and_pullback(fn, x, cotangent):
    @jax.jit
    def run(x, cotangent):
        y, pullback = jax.vjp(fn, x)
        return y, *pullback(cotangent)

    return run(x, cotangent)


class ReluTest(parameterized.TestCase):
    @parameterized.product(shape=_SHAPES, dtype=("float32", "bfloat16", "float16"))
    def test_value_and_gradient_are_jax_nns_to_the_bit(self, shape, dtype):
        x = reference.activation(0, shape, dtype)
        cotangent = reference.activation(1, shape, dtype)
        actual = _value_and_pullback(dropit_jax.nn.relu, x, cotangent)
        expected = _value_and_pullback(jax.nn.relu, x, cotangent)
        for ours, theirs in zip(actual, expected, strict=True):
            reference.assert_same_bits(ours, theirs)

    @parameterized.parameters(
        ((4, 8, 8, 32), 4 * 8 * 8 * 32 // 8), ((5, 3), 5), ((), 1)
    )
    def test_caches_one_bit_an_element(self, shape, nbytes):
        _, pullback = jax.vjp(dropit_jax.nn.relu, jnp.ones(shape))
        cached = sum(leaf.nbytes for leaf in jax.tree.leaves(pullback))
        self.assertEqual(cached, nbytes)

    def test_transformations(self):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 16)), jnp.float32)

        def loss(relu):
            return lambda x: jnp.sum(relu(x) ** 2)

        expected = jax.grad(loss(jax.nn.relu))(x)
        ours = loss(dropit_jax.nn.relu)
        chex.assert_trees_all_equal(jax.vmap(jax.grad(ours))(x), expected)
        chex.assert_trees_all_equal(jax.grad(jax.checkpoint(ours))(x), expected)
        scanned = jax.lax.map(jax.grad(ours), x)
        chex.assert_trees_all_equal(scanned, expected)


if __name__ == "__main__":
    absltest.main()
