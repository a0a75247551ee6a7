"""What a plan says is what is stored; written down, it can be used again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from dropit_jax import drop, memory, plan
from dropit_jax.transform.forms import presets
from dropit_jax.transform.plan import Plan
from dropit_jax.transform.planning.planner import PlanError
from tests.dropit_jax.transform.features import FEATURES, PARAMS, X

_NAMES = ("convolved", "gated", "mlp", "scan", "softmax")


class PlanTest(parameterized.TestCase):
    @parameterized.product(name=_NAMES, preset=presets.PRESETS)
    def test_its_bytes_are_what_differentiation_keeps(self, name, preset):
        function = FEATURES[name]
        planned = plan(function, preset, argnums=(0, 1))(PARAMS, X)
        kept = memory.saved_residuals(drop(function, preset), PARAMS, X)
        self.assertEqual(planned.nbytes, kept.total_bytes)
        plain = memory.saved_residuals(function, PARAMS, X)
        self.assertLess(planned.nbytes, plain.total_bytes)

    @parameterized.parameters(*_NAMES)
    def test_lossy_presets_store_less(self, name):
        exact, lean, leanest = (
            plan(FEATURES[name], preset)(PARAMS, X).nbytes
            for preset in ("exact", "lean", "leanest")
        )
        self.assertLess(lean, exact)
        self.assertLess(leanest, lean)

    def test_written_and_read_it_is_the_same(self):
        planned = plan(FEATURES["scan"], "lean", argnums=(0, 1))(PARAMS, X)
        again = Plan.from_json(planned.to_json())
        self.assertEqual(again, planned)
        self.assertEqual(hash(again), hash(planned))
        found, expected = (
            jax.grad(drop(FEATURES["scan"], each), argnums=(0, 1))(PARAMS, X)
            for each in (again, "lean")
        )
        jax.tree.map(np.testing.assert_array_equal, found, expected)

    def test_of_other_arguments_it_is_an_error(self):
        planned = plan(FEATURES["mlp"])(PARAMS, X)
        with pytest.raises(PlanError, match="another function, or of arguments"):
            jax.grad(drop(FEATURES["mlp"], planned))(PARAMS, X[:4])

    @parameterized.parameters("", "{}", "[]", '{"preset": 1}')
    def test_other_text_is_an_error(self, text):
        with pytest.raises(ValueError, match="Not a plan that to_json wrote"):
            Plan.from_json(text)

    def test_it_needs_no_arrays(self):
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (PARAMS, X)
        )
        planned = plan(FEATURES["mlp"])(*shapes)
        self.assertEqual(planned, plan(FEATURES["mlp"])(PARAMS, X))

    def test_a_dropped_function_brings_its_preset(self):
        dropped = drop(FEATURES["mlp"], "exact")
        self.assertEqual(plan(dropped)(PARAMS, X).preset, presets.preset("exact"))

    def test_what_is_not_differentiated_costs_nothing(self):
        def function(params, x):
            return jnp.sum((jnp.tanh(x @ params["w"][0]) @ params["w"][1]) ** 2)

        both = plan(function, "exact", argnums=(0, 1))(PARAMS, X)
        inputs = plan(function, "exact", argnums=1)(PARAMS, X)
        nothing = plan(function, "exact", argnums=())(PARAMS, X)
        self.assertLessEqual(inputs.nbytes, both.nbytes)
        self.assertEqual(nothing.nbytes, 0)

    def test_printed_it_is_a_table(self):
        text = str(plan(FEATURES["mlp"])(PARAMS, X))
        for word in ("8 bits", "flowing", "features.py:", "plain function", "again"):
            self.assertIn(word, text)


if __name__ == "__main__":
    absltest.main()
