"""`drop` on every feature of JAX inside a function: values, gradients, operations."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from dropit_jax import drop, plan
from dropit_jax.transform.tracing import program as programs
from tests.dropit_jax.transform.comparing import error, primitives
from tests.dropit_jax.transform.features import FEATURES, PARAMS, X

# Those of which a program of the dropped function could differ.
_UNLIKE = (
    "custom_vjp",
    "dropit_layer",
    "ordered_effects",
    "pooled",
    "scan_of_checkpointed",
)


class FeatureTest(parameterized.TestCase):
    @parameterized.parameters(*sorted(FEATURES))
    def test_exact_is_jaxs_gradient_and_lean_is_near(self, name):
        function = FEATURES[name]

        @jax.jit  # one program, which takes less time to compile than three
        def gradients(*args):
            functions = (function, drop(function, "exact"), drop(function, "lean"))
            return [jax.value_and_grad(f, argnums=(0, 1))(*args) for f in functions]

        (value, expected), exact, lean = gradients(PARAMS, X)
        for preset, (dropped_value, found), bound in (
            ("exact", exact, 1e-5),
            ("lean", lean, 0.02),
        ):
            np.testing.assert_allclose(dropped_value, value, rtol=1e-6)
            chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
            self.assertLess(error(found, expected), bound, preset)

    @parameterized.parameters(*_UNLIKE)
    def test_not_differentiated_it_is_the_function(self, name):
        function = FEATURES[name]
        np.testing.assert_array_equal(
            jax.jit(drop(function))(PARAMS, X), jax.jit(function)(PARAMS, X)
        )

    def test_nor_is_it_another_where_nothing_is_jitted(self):
        def attend(weights, x):
            heads = [jnp.reshape(x @ w, (2, 8, 4, 16)) for w in weights]
            return jax.nn.dot_product_attention(*heads, is_causal=True)

        weights = list(jax.random.normal(jax.random.key(0), (3, 64, 64)))
        x = jax.random.normal(jax.random.key(1), (2, 8, 64))
        np.testing.assert_array_equal(drop(attend)(weights, x), attend(weights, x))

    def test_not_differentiated_it_is_the_functions_program(self):
        for name, function in FEATURES.items():
            plain, dropped = (
                programs.flatten(jax.make_jaxpr(f)(PARAMS, X))
                for f in (function, drop(function))
            )
            found, expected = (
                [
                    (node.name, [str(program.avals[value]) for value in node.outputs])
                    for node in program.nodes
                ]
                for program in (dropped, plain)
            )
            self.assertEqual(found, expected, name)


class CheckpointPolicyTest(parameterized.TestCase):
    """What a policy saves or moves to the host is not computed again, as in JAX."""

    @parameterized.product(
        name=("checkpointed_with_policy", "offloaded"), preset=("exact", "lean")
    )
    def test_products_and_moves(self, name, preset):
        plain, dropped = (
            primitives(jax.make_jaxpr(jax.grad(function))(PARAMS, X))
            for function in (FEATURES[name], drop(FEATURES[name], preset))
        )
        for operation in ("dot_general", "device_put"):
            self.assertEqual(dropped[operation], plain[operation], operation)
        self.assertEqual(plain["device_put"] > 0, name == "offloaded")


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


if __name__ == "__main__":
    absltest.main()
