"""JAX's transformations of single operations; those of models are another file's."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax import lax

from dropit_jax import DropIT, dot_general


class TransformationsTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        policy = DropIT(0.75)
        rng = np.random.default_rng(0)
        # Half of it zero and with ties, as after a ReLU.
        lhs = np.maximum(np.round(rng.normal(size=(4, 3, 32)), 1), 0)
        self.lhs = jnp.asarray(lhs, jnp.float32)
        self.rhs = jnp.asarray(rng.normal(size=(32, 32)), jnp.float32)
        numbers = (((1,), (0,)), ((), ()))
        self.product = lambda x, w: dot_general(x, w, numbers, dropit=policy)

    def _loss(self, x, w):
        return jnp.sum(jnp.tanh(self.product(x, w)))

    def test_vmap(self):
        gradient = jax.grad(self._loss, argnums=(0, 1))
        for axes in ((0, None), (0, 0)):
            w = self.rhs if axes[1] is None else jnp.stack([self.rhs, -self.rhs] * 2)
            batched = jax.jit(jax.vmap(gradient, axes))(self.lhs, w)
            each = [
                gradient(x, w if axes[1] is None else w[i])
                for i, x in enumerate(self.lhs)
            ]
            expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
            chex.assert_trees_all_close(batched, expected, rtol=1e-5, atol=1e-5)

    def test_scan_is_the_unrolled_loop(self):
        def layer(x, w):
            return jnp.tanh(self.product(x, w))

        weights = jnp.stack([self.rhs, -self.rhs, 0.5 * self.rhs]) / 6

        def looped(weights):
            return lax.scan(lambda x, w: (layer(x, w), None), self.lhs[0], weights)[
                0
            ].sum()

        def unrolled(weights):
            return functools.reduce(layer, weights, self.lhs[0]).sum()

        chex.assert_trees_all_close(
            jax.jit(jax.grad(looped))(weights),
            jax.jit(jax.grad(unrolled))(weights),
            rtol=1e-5,
            atol=1e-5,
        )

    @parameterized.parameters(
        None,
        jax.checkpoint_policies.dots_saveable,
        jax.checkpoint_policies.save_only_these_names("dropit"),
    )
    def test_checkpoint(self, policy):
        rematerialised = jax.checkpoint(self._loss, policy=policy)
        chex.assert_trees_all_close(
            jax.jit(jax.grad(rematerialised, argnums=(0, 1)))(self.lhs[0], self.rhs),
            jax.jit(jax.grad(self._loss, argnums=(0, 1)))(self.lhs[0], self.rhs),
            rtol=1e-6,
        )

    def test_without_jit(self):
        # So small that 1 - tanh² keeps its digits.
        x, w = self.lhs[0], self.rhs / 6
        chex.assert_trees_all_close(
            jax.grad(self._loss, argnums=1)(x, w),
            jax.jit(jax.grad(self._loss, argnums=1))(x, w),
            rtol=1e-5,
            atol=1e-6,
        )


if __name__ == "__main__":
    absltest.main()
