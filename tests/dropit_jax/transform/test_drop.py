"""`drop` on every feature of JAX: values and gradients are the function's."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from dropit_jax import drop, plan
from tests.dropit_jax.transform.features import FEATURES, PARAMS, X


def _gradient(function):
    return jax.jit(jax.value_and_grad(function, argnums=(0, 1)))(PARAMS, X)


def _error(found, expected):
    found, expected = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        for tree in (found, expected)
    )
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


class FeatureTest(parameterized.TestCase):
    @parameterized.parameters(*sorted(FEATURES))
    def test_exact_is_jaxs_gradient_and_lean_is_near(self, name):
        function = FEATURES[name]
        value, expected = _gradient(function)
        for preset, bound in (("exact", 1e-5), ("lean", 0.05)):
            dropped_value, found = _gradient(drop(function, preset))
            np.testing.assert_allclose(dropped_value, value, rtol=1e-6)
            chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
            self.assertLess(_error(found, expected), bound, preset)

    @parameterized.parameters(*sorted(FEATURES))
    def test_not_differentiated_it_is_the_function(self, name):
        function = FEATURES[name]
        np.testing.assert_array_equal(
            jax.jit(drop(function))(PARAMS, X), jax.jit(function)(PARAMS, X)
        )


class ParametersTest(parameterized.TestCase):
    """Parameters are alive anyway: neither they nor products with them cost more."""

    @parameterized.product(
        name=("cond", "gated", "mlp", "scan", "scan_nested"),
        preset=("exact", "lean"),
    )
    def test_no_product_with_a_parameter_is_computed_twice(self, name, preset):
        plain, dropped = (
            str(jax.make_jaxpr(jax.grad(function))(PARAMS, X)).count("dot_general[")
            for function in (FEATURES[name], drop(FEATURES[name], preset))
        )
        self.assertEqual(dropped, plain)

    def test_branches_do_not_store_them(self):
        shapes = {value.shape for value in plan(FEATURES["cond"])(PARAMS, X).values}
        self.assertNotIn((16, 16), shapes)


class AroundTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.function = FEATURES["mlp"]
        self.dropped = drop(self.function, "exact")

    def _assert_same(self, transform, *args):
        found, expected = (
            jax.jit(transform(function))(*args)
            for function in (self.dropped, self.function)
        )
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)

    def test_argnums(self):
        for argnums in (0, 1, (1, 0)):
            self._assert_same(lambda f, a=argnums: jax.grad(f, argnums=a), PARAMS, X)

    def test_auxiliary_output(self):
        def with_aux(function):
            return lambda p, x: (function(p, x), {"x": jnp.sin(x), "n": 3})

        found, expected = (
            jax.grad(function, has_aux=True)(PARAMS, X)
            for function in (
                drop(with_aux(self.function), "exact"),
                with_aux(self.function),
            )
        )
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)

    @parameterized.parameters(jax.checkpoint, jax.jit, functools.partial)
    def test_of_a_result_that_is_not_differentiated_nothing_is_computed(self, wrap):
        @wrap
        def block(p, x):
            y = jnp.tanh(x @ p["w"][0])
            return y, jnp.sin(y @ p["w"][1])

        def function(p, x):
            first, second = block(p, x)
            return jnp.sum(first**2), second

        found, expected = (
            jax.grad(f, has_aux=True)(PARAMS, X)
            for f in (drop(function, "exact"), function)
        )
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)

    def test_vjp_of_several_outputs(self):
        def outputs(p, x):
            return {"a": jnp.tanh(x @ p["w"][0]), "b": (x @ p["w"][1]) ** 2}

        for function in (outputs, drop(outputs, "exact")):
            value, pullback = jax.vjp(function, PARAMS, X)
            found = pullback(jax.tree.map(jnp.cos, value))
            if function is outputs:
                expected = found
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)

    def test_vmap_of_gradients(self):
        self._assert_same(
            lambda f: jax.vmap(jax.grad(f), (None, 0)), PARAMS, X.reshape(4, 2, 16)
        )

    def test_gradient_of_vmap(self):
        self._assert_same(
            lambda f: jax.grad(lambda p, x: jax.vmap(f, (None, 0))(p, x).sum()),
            PARAMS,
            X.reshape(4, 2, 16),
        )

    def test_scan_of_gradients(self):
        def accumulate(function):
            def turn(total, x):
                gradient = jax.grad(function)(PARAMS, x)
                return jax.tree.map(jnp.add, total, gradient), None

            zeros = jax.tree.map(jnp.zeros_like, PARAMS)
            return lambda xs: jax.lax.scan(turn, zeros, xs)[0]

        self._assert_same(accumulate, X.reshape(4, 2, 16))

    def test_checkpoint(self):
        self._assert_same(lambda f: jax.grad(jax.checkpoint(f)), PARAMS, X)

    def test_again(self):
        self._assert_same(lambda f: jax.grad(drop(f, "exact")), PARAMS, X)

    def test_closed_over_values_are_differentiated(self):
        def of_closure(function):
            def outer(params, x):
                transformed = (drop if function is self.dropped else lambda f, _: f)(
                    lambda x: self.function(params, x), "exact"
                )
                return transformed(x)

            return jax.grad(outer, argnums=(0, 1))

        self._assert_same(of_closure, PARAMS, X)

    def test_static_arguments_are_given_as_they_are(self):
        def function(params, table, x):
            self.assertIsInstance(table, np.ndarray)
            return jnp.sum(jnp.tanh(x @ params["w"][int(table[0])]))

        table = np.array([2])
        for places in (1, (-2,)):
            dropped = drop(function, "exact", static_argnums=places)
            found = jax.grad(dropped)(PARAMS, table, X)
            expected = jax.grad(lambda p: function(p, table, X))(PARAMS)
            chex.assert_trees_all_close(found, expected, rtol=1e-6)
            self.assertGreater(plan(dropped)(PARAMS, table, X).nbytes, 0)
        with pytest.raises(ValueError, match="static_argnums=3: there are 2"):
            drop(self.function, static_argnums=3)(PARAMS, X)

    def test_what_is_no_array_passes_through(self):
        def function(params, x, *, activation, train, rate=0.5):
            y = activation(x @ params["w"][0])
            return jnp.sum(y * rate if train else y)

        keywords = {"activation": jnp.tanh, "train": True}
        found, expected = (
            jax.grad(f)(PARAMS, X, **keywords)
            for f in (drop(function, "exact"), function)
        )
        chex.assert_trees_all_close(found, expected, rtol=1e-6)


if __name__ == "__main__":
    absltest.main()
