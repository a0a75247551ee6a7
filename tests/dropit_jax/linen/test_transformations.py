"""JAX and Flax transform a layer as they do Flax's layer."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from dropit_jax import DropIT
from dropit_jax import linen as dn
from tests.dropit_jax.linen.layer_cases import POLICY, numbers, variables_of


class MaskTest(parameterized.TestCase):
    @parameterized.parameters(nn.ConvTranspose, nn.ConvLocal)
    def test_it_may_come_with_a_transformation(self, kind):
        # A mask of the trace that the layer is called in, and no constant.
        x = numbers((2, 4, 3))
        make = functools.partial(kind, 4, (3,), padding="VALID")
        variables = variables_of(make(), x)
        shape = variables["params"]["kernel"].shape
        masks = jnp.asarray(np.random.default_rng(0).random((2, *shape)) > 0.5)

        def gradient(layer, mask):
            def loss(variables):
                return jnp.sum(
                    layer(4, (3,), padding="VALID", mask=mask).apply(variables, x)
                )

            return jax.grad(loss)(variables)

        ours = functools.partial(getattr(dn, kind.__name__), dropit=DropIT(0.0))
        chex.assert_trees_all_close(
            jax.jit(jax.vmap(functools.partial(gradient, ours)))(masks),
            jax.jit(jax.vmap(functools.partial(gradient, kind)))(masks),
            rtol=1e-6,
        )


class TransformationsTest(parameterized.TestCase):
    def _gradients(self, dense, lift):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.tanh(dense(16, name="dense")(x)), None

        class Stack(nn.Module):
            @nn.compact
            def __call__(self, x):
                return lift(Layer)(name="layers")(x, None)[0]

        x = numbers((4, 16))
        variables = variables_of(Stack(), x)
        loss = lambda v: jnp.sum(Stack().apply(v, x))  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(variables)

    @parameterized.named_parameters(
        (
            "scan",
            lambda layer: nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=2,
            ),
        ),
        ("remat", nn.remat),
        (
            "remat_scan",
            lambda layer: nn.scan(
                nn.remat(layer),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=2,
            ),
        ),
        ("jit", nn.jit),
    )
    def test_flaxs_lifted_transformations(self, lift):
        plain = self._gradients(nn.Dense, lift)
        exact = functools.partial(dn.Dense, dropit=DropIT(0.0))
        chex.assert_trees_all_close(self._gradients(exact, lift), plain, rtol=1e-5)
        dropped = functools.partial(dn.Dense, dropit=POLICY)
        loss, gradients = self._gradients(dropped, lift)
        expected_loss, expected = plain
        self.assertAlmostEqual(loss, expected_loss, places=4)
        chex.assert_trees_all_equal_shapes_and_dtypes(gradients, expected)


if __name__ == "__main__":
    absltest.main()
