"""Presets, rules for named places, and policies for kernel values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dropit_jax import DropIT, Preset, drop, plan, preset
from dropit_jax.transform.forms.presets import PRESETS
from dropit_jax.transform.forms.storage import Codes
from tests.dropit_jax.transform.comparing import primitives
from tests.dropit_jax.transform.features import PARAMS, X


def _scoped(params, x):
    with jax.named_scope("encoder"):
        with jax.named_scope("first"):
            x = jnp.tanh(x @ params["w"][0])
        x, _ = lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, params["w"])
    x = checkpoint_name(jnp.tanh(x @ params["w"][1]), "middle")
    with jax.named_scope("head"):
        return jnp.sum(jnp.tanh(x @ params["w"][2]) ** 2)


def _rectified(params, x, rng=None):
    def turn(x, w):
        return jax.nn.relu(x @ w), None

    for w in params["w"]:
        x, _ = turn(x, w)
    x, _ = lax.scan(turn, x, params["w"])
    return jnp.sum(x**2)


def _forms(planned):
    """How the values of each place are stored."""
    found = {}
    for value in planned.values:
        if value.kind != "discrete":
            found.setdefault(value.layer, set()).add(value.form)
    return found


class PresetTest(parameterized.TestCase):
    def test_fields_can_be_changed(self):
        changed = preset("lean", kernel="int4")
        self.assertEqual(changed.kernel, Codes(4))
        self.assertEqual(changed.flowing, Codes(8))
        self.assertEqual(changed, Preset("lean", Codes(4), "int8"))

    def test_every_preset_is_read_as_it_is_written(self):
        ruled = preset("lean", rules={"head": "exact", "*/mlp": preset("dropit")})
        for each in (*map(preset, PRESETS), ruled):
            self.assertEqual(Preset.from_dict(each.to_dict()), each)
            self.assertEqual(hash(Preset.from_dict(each.to_dict())), hash(each))

    @parameterized.parameters(
        (lambda: preset("leanst"), ValueError, "Did you mean 'leanest'"),
        (lambda: preset("lean", kernel="int3"), ValueError, "'int3' for Preset.kernel"),
        (lambda: preset("lean", kernal="int4"), TypeError, "Did you mean kernel"),
        (lambda: preset("lean", flowing=DropIT()), ValueError, "takes no policy"),
        (lambda: preset("lean", flowing=4), TypeError, "Preset.flowing takes one of"),
        (lambda: preset("lean", traffic=-1), ValueError, "Preset.traffic must be"),
        (lambda: preset("lean", rules="head"), TypeError, "maps scopes or names"),
        (lambda: preset("lean", rules={"": "exact"}), TypeError, "maps scopes"),
        (lambda: preset("lean", rules={"a": "leen"}), ValueError, "Unknown preset"),
        (lambda: preset("lean", rules={"a": 8}), TypeError, r"rules\['a'\] takes"),
        (lambda: drop(jnp.sum, 8), TypeError, "drop takes the name of a preset"),
        (lambda: drop("lean"), TypeError, "drop takes a function, got 'lean'"),
    )
    def test_bad_input_is_named(self, make, error, message):
        with pytest.raises(error, match=message):
            make()


class RulesTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"head": "exact"}, {"head": {"exact"}, "encoder": {"8 bits"}}),
        ({"encoder/first": "int4"}, {"first": {"4 bits"}, "encoder": {"8 bits"}}),
        ({"encoder": "int4"}, {"first": {"4 bits"}, "encoder": {"4 bits"}}),
        ({"enc*": "leanest", "first": "exact"}, {"first": {"4 bits"}}),
        ({"first": "exact", "enc*": "leanest"}, {"first": {"exact"}}),
    )
    def test_a_rule_holds_in_the_place_that_it_names(self, rules, expected):
        forms = _forms(plan(_scoped, "lean", rules=rules)(PARAMS, X))
        self.assertEqual({place: forms[place] for place in expected}, expected)

    def test_a_rule_may_name_a_checkpoint(self):
        planned = plan(_scoped, "lean", rules={"middle": "exact"})(PARAMS, X)
        plain = plan(_scoped, "lean")(PARAMS, X)
        self.assertGreater(planned.nbytes, plain.nbytes)
        self.assertIn("exact", {value.form for value in planned.values})

    def test_where_a_place_is_exact_its_gradient_is(self):
        expected, found = (
            jax.jit(jax.grad(function))(PARAMS, X)["w"][2]
            for function in (_head, drop(_head, "leanest", rules={"head": "exact"}))
        )
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)

    def test_a_rule_that_names_no_place_is_an_error(self):
        dropped = drop(_scoped, rules={"haed": "exact"})
        with pytest.raises(ValueError, match=r"'haed'.*'encoder/first', 'head'"):
            jax.grad(dropped)(PARAMS, X)

    def test_a_plan_takes_no_rules(self):
        planned = plan(_scoped)(PARAMS, X)
        with pytest.raises(ValueError, match="A plan has its own rules"):
            drop(_scoped, planned, rules={"head": "exact"})


def _head(params, x):
    x = jnp.tanh(jnp.tanh(x @ params["w"][0]) @ params["w"][1])
    with jax.named_scope("head"):
        return jnp.sum(jnp.tanh(x @ params["w"][2]) ** 2)


class PolicyTest(parameterized.TestCase):
    @parameterized.parameters(
        DropIT(0.5),
        DropIT(0.75, granularity="channel"),
        DropIT(0.5, chunk_size=None),
        DropIT(0.5, value_dtype="int8"),
    )
    def test_only_gradients_of_parameters_change(self, policy):
        chosen = preset("dropit", kernel=policy)
        planned = plan(_rectified, chosen)(PARAMS, X)
        self.assertIn("kernel", {value.kind for value in planned.values})
        _check_gradients(self, drop(_rectified, chosen))

    def test_the_paper_is_the_default(self):
        self.assertEqual(preset("dropit").kernel.policy, DropIT(value_dtype="bfloat16"))
        _check_gradients(self, drop(_rectified, "dropit"))

    def test_a_random_policy_takes_a_key_of_each_step(self):
        policy = DropIT(0.5, "random")
        chosen = preset("dropit", kernel=policy)
        with pytest.raises(ValueError, match="name the argument that brings a PRNG"):
            drop(_rectified, chosen)
        dropped = drop(_rectified, chosen, key="rng")
        gradient = jax.jit(jax.grad(dropped))
        params = {"w": PARAMS["w"][:1]}
        first, again, second = (
            gradient(params, X, rng=jax.random.key(seed))["w"] for seed in (0, 0, 1)
        )
        np.testing.assert_array_equal(first, again)
        self.assertFalse(np.array_equal(first, second))
        raw = gradient(params, X, jax.random.PRNGKey(0))["w"]
        np.testing.assert_array_equal(raw, first)
        args = params, X, jax.random.key(0)
        planned = plan(dropped)(*args)
        of_plan = jax.make_jaxpr(jax.grad(drop(_rectified, planned, key="rng")))(*args)
        self.assertEqual(
            primitives(of_plan), primitives(jax.make_jaxpr(jax.grad(dropped))(*args))
        )

    def test_turns_of_a_loop_draw_for_themselves(self):
        chosen = preset("dropit", kernel=DropIT(0.5, "random"))

        def function(w, x, rng):
            def turn(total, _):
                return total + jnp.sum(jax.nn.relu(x @ identity) @ w), None

            return lax.scan(turn, 0.0, None, length=2)[0]

        # Each turn drops half of the same input: were it the same half, half of the
        # gradient's rows that have one input alone would be zero.
        x, w, identity = jnp.full((1, 64), 1.5), jnp.ones((64, 1)), jnp.eye(64)
        gradient = jax.jit(jax.grad(drop(function, chosen, key="rng")))
        rows = gradient(w, x, jax.random.key(0))[:, 0]
        self.assertIn(1.5, np.unique(rows))
        self.assertLen(np.unique(rows), 3)

    @parameterized.parameters(
        ("rong", "is not there; the arguments are 'params', 'x', 'rng'"),
        ("x", "is of another type"),
    )
    def test_another_argument_is_no_key(self, name, message):
        chosen = preset("dropit", kernel=DropIT(0.5, "random"))
        dropped = drop(_rectified, chosen, key=name)
        with pytest.raises(ValueError, match=message):
            jax.grad(dropped)(PARAMS, X, jax.random.key(0))


def _check_gradients(test, dropped):
    """The gradient of the input is exact, that of parameters is not."""

    @jax.jit
    def gradients(*args):
        functions = _rectified, dropped
        return [jax.grad(function, argnums=(0, 1))(*args) for function in functions]

    params = {"w": PARAMS["w"][:2]}
    (expected_w, expected), (found_w, found) = gradients(params, X)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    test.assertFalse(np.allclose(found_w["w"], expected_w["w"], rtol=1e-3))


if __name__ == "__main__":
    absltest.main()
