"""`intercept` selects layers by order, path and policy, and reports them."""

import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

from dropit_jax import linen as dn
from dropit_jax import memory
from tests.dropit_jax.linen.intercepted_models import (
    ATTENTION,
    BYTES,
    LIFTED,
    OTHER,
    OTHER_BYTES,
    POLICY,
    Block,
    Compact,
    Lifted,
    OneLayer,
    Setup,
    X,
    bytes_cached,
    changed,
    numbers,
    paths_of,
    run_model,
    shapes_of,
    variables_of,
)


class FirstLayerTest(parameterized.TestCase):
    @parameterized.named_parameters(
        (name, block) for name, block in LIFTED.items() if name != "jit"
    )
    def test_it_may_be_in_a_lifted_module(self, block):
        model = Lifted(block, functools.partial(nn.Dense, use_bias=False), block)
        expected = run_model(model, variables := variables_of(model))[1]
        with dn.intercept(POLICY) as report:
            actual = run_model(model, variables)[1]
            again = bytes_cached(model), bytes_cached(model)
        self.assertEqual(changed(actual, expected), {"second/dense"})
        self.assertEqual(paths_of(report), ["second/dense"])
        # Flax keeps what `nn.jit` traced the first time.
        steps = 3 if block is LIFTED["scan"] else 1
        self.assertEqual(again, (steps * BYTES, steps * BYTES))

    def test_blocks_of_one_trace_have_one_decision(self):
        alike = nn.jit(Block)  # keeps one trace for both
        model = Lifted(alike, first=alike)
        with dn.intercept(POLICY):
            self.assertEqual(bytes_cached(model), 0)
        with dn.intercept(POLICY, skip_first=False):
            self.assertEqual(bytes_cached(model), 2 * BYTES)

    def test_other_methods_have_a_first_layer_of_their_own(self):
        bound = Setup().bind(variables_of(Setup()))
        with dn.intercept(POLICY) as report:
            self.assertEqual(bytes_cached(Setup(), method="decode"), BYTES)
            self.assertIn(
                "between_0", paths_of(report)
            )  # in `__call__`, for the shapes
        with dn.intercept(POLICY) as report:
            bound.decode(X)
            bound.decode(X)
        self.assertEqual(paths_of(report), ["between_1"])

    @parameterized.parameters(
        lambda f, model, v, x: model.apply(v, x, method=f),
        lambda f, model, v, x: nn.apply(f, model)(v, x),
        lambda f, model, v, x: f(model.bind(v), x),
    )
    def test_the_method_may_be_a_function(self, apply):
        def decode_after_first(model, x):
            return model.last(nn.tanh(model.decode(nn.tanh(model.first(x)))))

        with dn.intercept(POLICY) as report:
            gradient = jax.grad(
                lambda v: apply(decode_after_first, Setup(), v, X).sum()
            )
            cached = memory.cached_bytes(gradient, variables_of(Setup()))
        self.assertEqual(paths_of(report), ["between_0", "between_1", "last"])
        self.assertEqual(cached, report.bytes_after)
        self.assertEqual(cached, 3 * BYTES)

    def test_it_need_not_be_skipped(self):
        with dn.intercept(POLICY, skip_first=False) as report:
            self.assertEqual(bytes_cached(Compact()), 3 * BYTES)
        self.assertEqual(paths_of(report), ["first", "second", "third"])

    def test_a_model_may_be_one_layer(self):
        with dn.intercept(POLICY) as report:
            self.assertEqual(bytes_cached(nn.Dense(4)), 0)
        self.assertEmpty(report.layers)
        with dn.intercept(POLICY, skip_first=False) as report:
            self.assertEqual(bytes_cached(nn.Dense(4)), BYTES)
        self.assertRegex(str(report), r"(?m)^\. +Dense ")


class PathsTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"only": "third"}, ["third"]),
        ({"only": ["sec*", "thi?d"]}, ["second", "third"]),
        ({"only": "*d", "exclude": "t*"}, ["second"]),
        ({"exclude": ("third",)}, ["second"]),
        ({"exclude": "first"}, ["second", "third"]),
        ({"only": "first", "skip_first": False}, ["first"]),
    )
    def test_globs(self, arguments, expected):
        with dn.intercept(POLICY, **arguments) as report:
            self.assertEqual(bytes_cached(Compact()), len(expected) * BYTES)
        self.assertEqual(paths_of(report), expected)

    def test_a_star_matches_slashes(self):
        with dn.intercept(POLICY, only="*nd*") as report:
            shapes_of(Lifted(Block))
        self.assertEqual(paths_of(report), ["second/dense"])

    @parameterized.parameters(
        (
            {"only": ["second", "forth"]},
            "matches 'forth'; the layers are 'first', 'second', 'third'.",
        ),
        ({"only": "Second"}, "matches 'Second'"),
        ({"only": "first"}, "No layer but the first, which skip_first leaves alone,"),
        ({"exclude": ["sec", "third"]}, "matches 'sec';"),
        ({"skip_first": False, "only": "nth"}, "No layer matches 'nth'"),
    )
    def test_a_pattern_that_matches_nothing_is_refused(self, arguments, message):
        with (
            pytest.raises(ValueError, match=message),
            dn.intercept(POLICY, **arguments),
        ):
            shapes_of(Compact())

    def test_what_one_call_skips_another_may_use(self):
        variables = variables_of(Setup())
        with dn.intercept(POLICY, only="between_0") as report:
            Setup().apply(variables, X)
            Setup().apply(variables, X, method="decode")
        self.assertEqual(paths_of(report), ["between_0"])

    def test_nothing_is_refused_where_no_layer_was_traced(self):
        with dn.intercept(POLICY, only="no such layer") as report:
            pass
        self.assertEqual((report.bytes_before, report.bytes_after), (0, 0))
        self.assertRegex(str(report), r"^layer .*\n0 layers, bytes +0 +0$")

    @parameterized.parameters(
        (0.5, {}, TypeError, "DropIT policy, got 0.5"),
        (None, {}, TypeError, "DropIT policy, got None"),
        (POLICY, {"only": ["second", 3]}, TypeError, "only takes a glob .*3"),
        (POLICY, {"exclude": [None]}, TypeError, "exclude takes a glob .*None"),
        (POLICY, {"exclude": 3}, TypeError, "exclude takes a glob .*3"),
        (POLICY, {"only": []}, ValueError, r"only=\[\] matches no layer"),
    )
    def test_wrong_arguments_are_refused_at_once(
        self, dropit, arguments, error, message
    ):
        with pytest.raises(error, match=message):
            dn.intercept(dropit, **arguments)


class Reported(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(32, name="first")(x)
        x = ATTENTION(num_heads=2, name="mix")(x)
        return nn.Dense(8, dtype=jnp.bfloat16, name="head")(x)


# The head reads bfloat16. Of 256 values 128 are kept, with a bitmap of 32 bytes.
_TABLE = """\
layer            kind          input                 before  after
mix/query        DenseGeneral  float32[2, 4, 32]     1,024   544
mix/key          DenseGeneral  float32[2, 4, 32]     1,024   544
mix/value        DenseGeneral  float32[2, 4, 32]     1,024   544
mix/out          DenseGeneral  float32[2, 4, 2, 16]  1,024   544
head             Dense         bfloat16[2, 4, 32]    512     288
5 layers, bytes                                      4,608   2,464"""


class ReportTest(parameterized.TestCase):
    def test_bytes_and_table(self):
        with dn.intercept(POLICY) as report:
            cached = bytes_cached(Reported(), numbers(2, 4, 32))
        self.assertEqual(str(report), _TABLE)
        self.assertEqual((report.bytes_before, report.bytes_after), (4608, 2464))
        self.assertEqual(cached, 2464)
        expected = dn.InterceptedLayer(
            *("mix/key", "DenseGeneral", (2, 4, 32), jnp.dtype("float32"), 1024, 544)
        )
        self.assertEqual(report.layers[1], expected)

    def test_of_a_loop_it_counts_one_step(self):
        with dn.intercept(POLICY) as report:
            cached = bytes_cached(Lifted(LIFTED["scan"]))
        self.assertEqual((report.bytes_before, report.bytes_after), (384, BYTES))
        self.assertEqual(cached, 3 * BYTES)


class NestedTest(parameterized.TestCase):
    @parameterized.parameters({"only": "third"}, {"exclude": "second"})
    def test_the_inner_decides_where_it_selects(self, **arguments):
        variables = variables_of(Compact())
        with dn.intercept(OTHER) as outer:
            with dn.intercept(POLICY, **arguments) as inner:
                self.assertEqual(bytes_cached(Compact()), BYTES + OTHER_BYTES)
                actual = run_model(Compact(), variables)[1]
            self.assertEqual(
                (paths_of(outer), paths_of(inner)), (["second"], ["third"])
            )
            # And the outer goes on.
            self.assertEqual(bytes_cached(Compact()), 2 * OTHER_BYTES)
            by_outer = run_model(Compact(), variables)[1]
        self.assertEqual(changed(actual, by_outer), {"third"})

    def test_a_glob_of_the_outer_may_be_for_layers_that_the_inner_takes(self):
        with (
            dn.intercept(OTHER, only="third") as outer,
            dn.intercept(POLICY) as inner,
        ):
            self.assertEqual(bytes_cached(Compact()), 2 * BYTES)
        self.assertEmpty(outer.layers)
        self.assertEqual(paths_of(inner), ["second", "third"])

    @parameterized.parameters(
        functools.partial(dn.Dense, 8),
        functools.partial(dn.Einsum, (16, 8), "bc,cd->bd"),
    )
    def test_a_layers_own_policy_comes_first(self, layer):
        with dn.intercept(POLICY) as report:
            own = OneLayer(functools.partial(layer, dropit=OTHER))
            self.assertEqual(bytes_cached(own), OTHER_BYTES)
            self.assertEmpty(report.layers)
            # A layer without one is like Flax's.
            self.assertEqual(bytes_cached(OneLayer(layer)), BYTES)
        self.assertEqual(paths_of(report), ["layer"])

    def test_so_does_the_policy_of_attention(self):
        x, attention = numbers(3, 2, 16), dn.MultiHeadDotProductAttention
        model = OneLayer(functools.partial(attention, 2, dropit=OTHER))
        with dn.intercept(POLICY) as report:
            self.assertEqual(bytes_cached(model, x), 4 * OTHER_BYTES)
        self.assertEmpty(report.layers)

    def test_exceptions_leave_nothing_behind(self):
        bound = Setup().bind(variables_of(Setup()))
        with (
            pytest.raises(flax.errors.ScopeParamShapeError),
            # That the glob matches nothing must not hide the error.
            dn.intercept(POLICY, skip_first=False, only=["first", "none"]),
        ):
            bound(numbers(6, 17))
        self.assertIsNone(bound.first.dot_general)
        self.assertIs(bound.first.promote_dtype, nn.dtypes.promote_dtype)
        self.assertEqual(bytes_cached(Setup()), 0)
        with dn.intercept(POLICY) as report:
            self.assertEqual(bytes_cached(Setup()), 3 * BYTES)
        self.assertNotIn("first", paths_of(report))


if __name__ == "__main__":
    absltest.main()
