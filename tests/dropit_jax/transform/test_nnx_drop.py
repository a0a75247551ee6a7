"""`dropit_jax.nnx.drop`: gradients and changed state are the plain function's."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import nnx

import dropit_jax
from dropit_jax import DropIT, preset

X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16)), jnp.float32)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(16, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(nnx.gelu(self.norm(self.linear(x))))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.head = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss(model, x, scale=1.0):
    return scale * jnp.mean(model(x) ** 2)


def _steps(function, *, jit):
    """Values and gradients of two calls, and the state of the model after them."""
    model = Net(nnx.Rngs(0))
    gradient = nnx.value_and_grad(function)
    run = nnx.jit(gradient) if jit else gradient
    results = [jax.tree.map(jnp.array, run(model, X)) for _ in range(2)]
    return results, _state(model)


def _state(model):
    """The arrays of a model, with the numbers of its keys."""

    def numbers(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(x) if is_key else x

    return jax.tree.map(numbers, nnx.state(model))


class NnxDropTest(parameterized.TestCase):
    @parameterized.parameters(True, False)
    def test_state_and_gradients_are_the_plain_functions(self, jit):
        dropped = dropit_jax.nnx.drop(loss, "exact")
        expected, found = (_steps(function, jit=jit) for function in (loss, dropped))
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)

    def test_lean_changes_the_state_likewise(self):
        expected, state = _steps(loss, jit=True)
        found, changed = _steps(dropit_jax.nnx.drop(loss), jit=True)
        chex.assert_trees_all_close(changed, state, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(found, expected, rtol=0.1, atol=0.02)

    def test_not_differentiated_it_is_the_function(self):
        models = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
        found, expected = dropit_jax.nnx.drop(loss)(models[0], X), loss(models[1], X)
        np.testing.assert_array_equal(found, expected)
        chex.assert_trees_all_equal(*map(_state, models))

    def test_keywords_and_several_modules(self):
        def function(model, head, x, *, scale):
            return scale * jnp.sum(head(model(x)) ** 2)

        def by_position(model, head, x, scale):
            return function(model, head, x, scale=scale)

        dropped = dropit_jax.nnx.drop(by_position, "exact")
        gradient = nnx.grad(dropped, argnums=(0, 1))
        models = Net(nnx.Rngs(0)), nnx.Linear(4, 4, rngs=nnx.Rngs(1))
        found = gradient(*models, X, scale=2.0)
        models = Net(nnx.Rngs(0)), nnx.Linear(4, 4, rngs=nnx.Rngs(1))
        expected = nnx.grad(by_position, argnums=(0, 1))(*models, X, 2.0)
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
        with pytest.raises(TypeError, match="takes scale by position"):
            dropit_jax.nnx.drop(function)(*models, X, scale=2.0)

    def test_a_plan_is_of_the_parameters_and_can_be_used(self):
        model = Net(nnx.Rngs(0))
        planned = dropit_jax.plan(dropit_jax.nnx.drop(loss))(model, X)
        self.assertLess(planned.nbytes, 0.25 * planned.plain_bytes)
        again = dropit_jax.nnx.drop(loss, planned)
        found, expected = (
            nnx.grad(function)(Net(nnx.Rngs(0)), X)
            for function in (again, dropit_jax.nnx.drop(loss))
        )
        chex.assert_trees_all_equal(found, expected)

    def test_a_key_may_be_an_argument(self):
        def with_key(model, x, rng):
            return jnp.sum(nnx.relu(model(x)) ** 2)

        chosen = preset("dropit", kernel=DropIT(0.5, "random"))
        dropped = dropit_jax.nnx.drop(with_key, chosen, key="rng")
        model = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
        gradient = nnx.grad(dropped)(model, jnp.tanh(X), jax.random.key(0))
        self.assertTrue(np.isfinite(gradient["kernel"][...]).all())


if __name__ == "__main__":
    absltest.main()
