"""Tests of plans: the bytes that they list, their errors, their text and JSON."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax import lax

from dropit_jax import drop, memory, plan
from dropit_jax.transform.forms import presets
from dropit_jax.transform.plan import Plan
from dropit_jax.transform.planning.planner import PlanError
from tests.dropit_jax.transform.features import FEATURES, PARAMS, X

_NAMES = ("convolved", "gated", "mlp", "scan", "scan_of_norms", "softmax")


def _language_model(params, tokens):
    """The loss of a network of eight layers with 4,096 words."""
    x = params["words"][tokens]
    for w in params["layers"]:
        x = jax.nn.gelu(x @ w)
    logits = jax.nn.log_softmax(x @ params["words"].T)
    return -jnp.mean(jnp.take_along_axis(logits, tokens[:, None], axis=1))


_LANGUAGE = (
    {
        "words": jax.ShapeDtypeStruct((4_096, 128), jnp.float32),
        "layers": [jax.ShapeDtypeStruct((128, 128), jnp.float32)] * 8,
    },
    jax.ShapeDtypeStruct((64,), jnp.int32),
)


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

    def test_equal_loops_are_told_apart_where_a_rule_names_one(self):
        def function(params, x):
            for name in ("first", "second"):
                with jax.named_scope(name):
                    x, _ = lax.scan(
                        lambda x, w: (jnp.tanh(x @ w), None), x, params["w"]
                    )
            return jnp.sum(x**2)

        rules = {"first": "exact"}
        planned = plan(function, "lean", argnums=(0, 1), rules=rules)(PARAMS, X)
        for each in (planned, Plan.from_json(planned.to_json())):
            kept = memory.saved_residuals(drop(function, each), PARAMS, X)
            self.assertEqual(kept.total_bytes, planned.nbytes)
        plain = plan(function, "lean", argnums=(0, 1))(PARAMS, X)
        self.assertGreater(planned.nbytes, plain.nbytes)

    def test_a_loop_that_jax_traces_twice_counts_once(self):
        planned = plan(FEATURES["scan"], "exact", argnums=0)(PARAMS, X)
        kept = memory.saved_residuals(
            lambda params: drop(FEATURES["scan"], "exact")(params, X), PARAMS
        )
        self.assertEqual(planned.nbytes, kept.total_bytes)

    def test_a_large_vocabulary_makes_nothing_else_small(self):
        planned = plan(_language_model)(*_LANGUAGE)
        hidden = {v.form for v in planned.values if v.shape == (64, 128)}
        self.assertEqual(hidden, {"8 bits"})

    def test_the_plain_functions_bytes_are_those_that_jax_keeps(self):
        for name, function in FEATURES.items():
            if name.startswith("reference_"):
                continue  # `drop` leaves them as they are, and has no plan of them
            planned = plan(function, "exact", argnums=(0, 1))(PARAMS, X)
            kept = memory.saved_residuals(function, PARAMS, X)
            # A number that two calls of one jitted function make is one here.
            few = 8 if name == "convolved" else 0
            self.assertEqual(planned.plain_bytes + few, kept.total_bytes, name)

    def test_of_other_arguments_it_is_an_error(self):
        planned = plan(FEATURES["mlp"])(PARAMS, X)
        with pytest.raises(PlanError, match="another function, or for arguments"):
            jax.grad(drop(FEATURES["mlp"], planned))(PARAMS, X[:4])

    def test_the_type_of_an_argument_counts_where_its_cast_has_one_type(self):
        def function(w, mask):
            return jnp.sum(jnp.sin(w * mask.astype(jnp.float32)))

        mask = jnp.arange(64.0).reshape(8, 8) % 3
        planned = plan(function)(mask, mask > 0)
        with pytest.raises(PlanError, match="arguments of other types"):
            jax.grad(drop(function, planned))(mask, jnp.float16(mask))

    def test_large_numbers_in_a_constant_count(self):
        """They are a mask, and the sum with a mask is stored exactly."""

        def masked(constant):
            @jax.jit
            def add(x):
                return jnp.where(x > 0, x, constant)

            return lambda x: jnp.sum(jnp.tanh(add(jnp.sin(x)) * x))

        zeros, x = np.zeros((64, 64), np.float32), jnp.ones((64, 64))
        planned = [plan(masked(each))(x) for each in (zeros, zeros - 1e9, zeros)]
        self.assertNotEqual(planned[0], planned[1])
        self.assertEqual(planned[0], planned[2])

    @parameterized.parameters("", "{}", "[]", '{"preset": 1}')
    def test_other_text_is_an_error(self, text):
        with pytest.raises(ValueError, match="Not a plan that to_json wrote"):
            Plan.from_json(text)

    def test_a_form_that_does_not_exist_is_an_error(self):
        text = plan(FEATURES["mlp"])(PARAMS, X).to_json()
        self.assertIn('"int8"', text)
        with pytest.raises(ValueError, match=r"Not a plan that to_json wrote.*int9"):
            Plan.from_json(text.replace('"int8"', '"int9"'))

    def test_a_price_of_numpy_is_written_as_a_number(self):
        preset = presets.preset("lean", traffic=np.float32(0.5))
        planned = plan(FEATURES["mlp"], preset)(PARAMS, X)
        self.assertEqual(Plan.from_json(planned.to_json()).preset.traffic, 0.5)

    def test_it_needs_no_arrays(self):
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (PARAMS, X)
        )
        planned = plan(FEATURES["mlp"])(*shapes)
        self.assertEqual(planned, plan(FEATURES["mlp"])(PARAMS, X))

    def test_a_dropped_function_brings_its_preset(self):
        dropped = drop(FEATURES["mlp"], "exact")
        self.assertEqual(plan(dropped)(PARAMS, X).preset, presets.preset("exact"))

    def test_so_does_a_jitted_one(self):
        dropped = jax.jit(drop(FEATURES["mlp"], "exact"))
        self.assertEqual(plan(dropped)(PARAMS, X).preset, presets.preset("exact"))

    def test_a_function_around_it_is_another_one(self):
        dropped = drop(FEATURES["mlp"], "exact")

        @functools.wraps(dropped)
        def twice(params, x):
            return dropped(params, x) + FEATURES["mlp"](params, jnp.sin(x))

        planned = plan(twice)(PARAMS, X)
        expected = plan(twice.__call__)(PARAMS, X)  # has no attribute of `dropped`
        self.assertEqual(planned.nbytes, expected.nbytes)
        chex.assert_trees_all_equal_shapes(
            jax.grad(drop(twice, planned))(PARAMS, X), PARAMS
        )

    def test_a_scope_is_printed_as_it_is(self):
        def function(params, x):
            with jax.named_scope("block[a]:smile:"):
                return jnp.sum(jnp.tanh(x @ params["w"][0]))

        self.assertIn("block[a]:smile:", str(plan(function)(PARAMS, X)))

    def test_a_scan_of_symbolic_length(self):
        def function(x, xs):
            return jnp.sum(lax.scan(lambda c, y: (jnp.sin(c * y), None), x, xs)[0])

        sizes = jax.export.symbolic_shape("n, 64")
        args = (
            jax.ShapeDtypeStruct((64,), jnp.float32),
            jax.ShapeDtypeStruct(sizes, jnp.float32),
        )
        exported = jax.export.export(jax.jit(jax.grad(drop(function, "exact"))))(*args)
        x, xs = jnp.linspace(0, 1, 64), jnp.linspace(0.5, 1, 320).reshape(5, 64)
        chex.assert_trees_all_close(
            exported.call(x, xs), jax.grad(function)(x, xs), rtol=1e-5
        )

    def test_so_it_does_with_its_rules(self):
        def function(params, x):
            with jax.named_scope("first"):
                x = jnp.tanh(x @ params["w"][0])
            return jnp.sum(jnp.sin(x @ params["w"][1]))

        rules = {"first": "exact"}
        found = plan(drop(function, "lean", rules=rules))(PARAMS, X)
        self.assertEqual(found, plan(function, "lean", rules=rules)(PARAMS, X))
        self.assertNotEqual(found, plan(function, "lean")(PARAMS, X))

    def test_what_is_not_differentiated_costs_nothing(self):
        def function(params, x):
            return jnp.sum((jnp.tanh(x @ params["w"][0]) @ params["w"][1]) ** 2)

        both = plan(function, "exact", argnums=(0, 1))(PARAMS, X)
        inputs = plan(function, "exact", argnums=1)(PARAMS, X)
        nothing = plan(function, "exact", argnums=())(PARAMS, X)
        self.assertLessEqual(inputs.nbytes, both.nbytes)
        self.assertEqual(nothing.nbytes, 0)

    @parameterized.parameters("exact", "lean")
    def test_the_gradient_of_a_mean_is_not_written_out(self, preset):
        plain, dropped = (
            memory.compile_report(jax.grad(each), *_LANGUAGE, target="h100").temp_bytes
            for each in (_language_model, drop(_language_model, preset))
        )
        self.assertLess(dropped, 1.05 * plain)

    def test_printed_it_is_a_table(self):
        text = str(plan(FEATURES["mlp"])(PARAMS, X))
        for word in ("8 bits", "flowing", "network.py:", "plain function", "again"):
            self.assertIn(word, text)


if __name__ == "__main__":
    absltest.main()
