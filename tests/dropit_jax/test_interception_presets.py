from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import jax_resnet
import pytest
from absl.testing import absltest, parameterized
from attnax import FeedForward
from flax import nnx
from transformer_in_transformer_flax import TNTConfig, TransformerInTransformer

from dropit_jax import DropIT, layer_presets
from dropit_jax import linen as dn
from dropit_jax import nn as dnn
from tests.dropit_jax import interception_cases as cases
from tests.dropit_jax import reference

# What one of the transformers is made of; Flax has announced the end of it.
pytestmark = pytest.mark.filterwarnings("ignore:SelfAttention will be deprecated")


class ArgumentsTest(cases.PresetTestCase):
    @parameterized.parameters(
        ("leen", ValueError, "Unknown preset 'leen'.* Did you mean 'lean'"),
        (0.5, TypeError, "takes a DropIT policy, got 0.5; a preset, or its name"),
    )
    def test_what_is_neither_policy_nor_preset_is_refused(self, given, error, message):
        with pytest.raises(error, match=message):
            dn.intercept(given)

    def test_the_baseline_does_nothing(self):
        traces = []

        @jax.jit
        def gradient(variables):
            traces.append(None)
            return jax.grad(lambda v: cases.Dense().apply(v, cases.X).sum())(variables)

        variables = cases.variables(cases.Dense())
        gradient(variables)
        with dn.intercept("baseline", only="none") as report:
            self.assertTrue(cases.is_untouched())
            gradient(variables)
        self.assertLen(traces, 1)
        self.assertEqual((report.layers, report.unreached), ([], ()))

    def test_traces_are_shared_where_presets_are_alike(self):
        traces, variables = [], cases.variables(cases.Dense())

        @jax.jit
        def gradient(variables):
            traces.append(None)
            return jax.grad(lambda v: cases.Dense().apply(v, cases.X).sum())(variables)

        for given, count in (
            ("baseline", 1),
            ("lean", 2),
            (layer_presets.layer_preset("lean"), 2),
            (cases.LEAN.dropit, 3),
            (layer_presets.layer_preset("lean", rate=0.5), 4),
            ("dropit", 5),
            ("baseline", 5),
        ):
            with dn.intercept(given):
                jax.eval_shape(gradient, variables)
            self.assertLen(traces, count)


_MODELS = {
    "convolutional": (
        cases.Convolutional(),
        (2, 8, 8, 3),
        ["BatchNorm", "relu", "max_pool", "Conv", "relu", "Dropout", "Dense"],
    ),
    "transformer": (
        cases.Transformer(),
        (2, 8, 16),
        [
            *("LayerNorm", "DenseGeneral", "DenseGeneral", "DenseGeneral"),
            *("MultiHeadDotProductAttention", "DenseGeneral", "Dropout", "RMSNorm"),
            *("Dense", "gelu", "Dense"),
        ],
    ),
}


class WholeModelsTest(cases.PresetTestCase):
    @parameterized.parameters(*_MODELS)
    def test_output_is_the_models_and_gradients_are_near(self, name):
        model, shape, kinds = _MODELS[name]
        x = cases.numbers(*shape)
        expected, gradients = cases.run(model, x)
        # Dropout, pooling and rectifiers change no bit; 8 bits change some.
        for preset, tolerance in ((cases.BITS_EXACT, 1e-5), (cases.LEAN_EXACT, 0.03)):
            with dn.intercept(preset) as report:
                actual, near = cases.run(model, x)
            jax.tree.map(reference.assert_same_bits, actual, expected)
            self.assert_near(near, gradients, tolerance)
            self.assertEmpty(report.unreached)
        self.assertEqual(cases.kinds(report), kinds)

    @parameterized.product(name=tuple(_MODELS), preset=("dropit", "lean"))
    def test_the_report_is_all_that_is_cached(self, name, preset):
        model, shape, _ = _MODELS[name]
        x = cases.numbers(*shape)
        before = cases.cached(model, x)
        with dn.intercept(preset) as report:
            after = cases.cached(model, x)
        if preset == "lean":
            self.assertEqual(after, report.bytes_after)
        self.assertLess(after, {"dropit": 0.95, "lean": 0.25}[preset] * before)

    def test_bfloat16(self):
        model = nn.Sequential([nn.Dense(16, dtype=jnp.bfloat16), nn.gelu, nn.relu])
        expected, gradients = cases.run(model, cases.X)
        with dn.intercept(cases.LEAN_EXACT) as report:
            actual, near = cases.run(model, cases.X)
            casts = 2 * (16 * 16 + cases.X.size)  # of the kernel and the input
            self.assertEqual(cases.cached(model), casts + cases.CODES + cases.BITS)
        reference.assert_same_bits(actual[0], expected[0])
        self.assert_near(near, gradients, 0.02)
        rows = [(r.kind, r.dtype, r.bytes_before) for r in report.layers]
        dtype = jnp.dtype("bfloat16")
        expected = [("gelu", dtype, 2 * cases.CODES), ("relu", dtype, 2 * cases.CODES)]
        self.assertEqual(rows, expected)


class Lifted(nn.Module):
    """A block in a loop, or another transformation."""

    block: Any

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, name="first")(x)
        x, _ = self.block(name="one")(x, None)
        x, _ = self.block(name="two")(x, None)
        return x


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = nn.relu(nn.LayerNorm(name="norm")(x))
        return nn.Dense(16, name="dense")(x), None


def _scan(block):
    axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    return nn.scan(block, length=3, **axes)


# (block, how often what it caches is cached)
_LIFTED = {
    "jit": (nn.jit(Block), 1),
    "scan": (_scan(Block), 3),
    "remat": (nn.remat(Block), 0),
}


@jax.jit
def _jitted(x):
    return nn.gelu(x)


class Jitted(nn.Module):
    @nn.compact
    def __call__(self, x):
        return _jitted(nn.Dense(16)(x))


class TransformedTest(cases.PresetTestCase):
    @parameterized.named_parameters((name, *how) for name, how in _LIFTED.items())
    def test_lifted(self, block, times):
        model = Lifted(block)
        expected, gradients = cases.run(model, cases.X)
        with dn.intercept(cases.LEAN_EXACT) as report:
            actual, near = cases.run(model, cases.X)
            self.assertEqual(cases.kinds(report), 2 * ["LayerNorm", "relu", "Dense"])
            if times:
                self.assertEqual(cases.cached(model), times * report.bytes_after)
                self.assertEqual(cases.cached(model), times * report.bytes_after)
        self.assertEqual(report.layers[4].path, "two")
        jax.tree.map(reference.assert_same_bits, actual, expected)
        self.assert_near(near, gradients, 0.02)

    def test_a_function_that_is_jitted_itself(self):
        before = cases.residual(_jitted, cases.X), cases.cached(Jitted())
        with dn.intercept(cases.ONLY_CODES):
            for _ in range(2):
                # Nobody calls it, and a module does.
                after = cases.residual(_jitted, cases.X), cases.cached(Jitted())
                self.assertEqual(after, (before[0], cases.CODES))
        with dn.intercept(cases.ONLY_CODES, exclude=[""]) as report:
            self.assertEqual(cases.cached(Jitted()), before[1])
        self.assertEmpty(report.layers)
        self.assertEqual(
            (cases.residual(_jitted, cases.X), cases.cached(Jitted())), before
        )

    def test_a_compiled_step_is_traced_again_on_the_other_side(self):
        variables = cases.variables(cases.Dense())

        @jax.jit
        def step(variables):
            return jax.grad(lambda v: cases.Dense().apply(v, cases.X).sum())(variables)

        expected = step(variables)
        with dn.intercept("lean"):
            actual = step(variables)
        kernels = [run["params"]["dense"]["kernel"] for run in (actual, expected)]
        self.assertTrue(jnp.any(kernels[0] != kernels[1]))
        chex.assert_trees_all_equal(step(variables), expected)

    def test_gradients_inside_of_a_module(self):
        class Physical(nn.Module):
            @nn.compact
            def __call__(self, x):
                return jax.vmap(jax.grad(lambda x: nn.relu(nn.gelu(x))))(x[:, 0])

        expected = Physical().apply({}, cases.X)
        with dn.intercept("lean") as report:
            actual = Physical().apply({}, cases.X)
        self.assertEqual(cases.kinds(report), ["gelu", "relu"])
        chex.assert_trees_all_close(actual, expected, atol=1 / 400)


class Paths(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = cases.Dense(name="a")(nn.Dense(16, name="first")(x))
        x = nn.LayerNorm(name="norm")(x)
        return nn.relu(cases.Dense(name="b")(x))


class PathsTest(cases.PresetTestCase):
    @parameterized.parameters(
        ({}, ["a/dense", "a", "norm", "b/dense", "b", ""]),
        ({"only": ["a", "norm"]}, ["a", "norm"]),
        ({"only": "b*"}, ["b/dense", "b"]),
        ({"exclude": ["b", "*/*"]}, ["a", "norm", ""]),
        ({"only": "first", "skip_first": False}, ["first"]),
    )
    def test_globs(self, arguments, expected):
        with dn.intercept("lean", **arguments) as report:
            cases.cached(Paths())
        self.assertEqual([layer.path for layer in report.layers], expected)

    @parameterized.parameters(
        ({"only": "c"}, "matches 'c'; the layers are 'first', 'a/dense', 'a', 'norm'"),
        ({"exclude": ["b", "n"]}, "No layer but the first, .* matches 'n'"),
        ({"only": "first"}, "No layer but the first, .* matches 'first'"),
    )
    def test_a_pattern_that_matches_nothing_is_refused(self, arguments, message):
        with (
            pytest.raises(ValueError, match=message),
            dn.intercept("lean", **arguments),
        ):
            cases.cached(Paths())


class NestedTest(cases.PresetTestCase):
    def test_the_inner_decides_what_it_has_to_do_with(self):
        with dn.intercept("lean") as outer:
            with dn.intercept("dropit", exclude="a*") as inner:
                cases.cached(Paths())
            kinds = {(layer.path, layer.kind) for layer in outer.layers}
            # No bits in the outer one, and none of 8 in the inner one.
            by_outer = {("a/dense", "Dense"), ("a", "gelu"), ("b", "gelu")}
            self.assertEqual(kinds, {*by_outer, ("norm", "LayerNorm")})
            self.assertEqual(cases.kinds(inner), ["Dense", "relu"])
            cases.cached(Paths())
        self.assertIn(("", "relu"), {(r.path, r.kind) for r in outer.layers})

    def test_a_policy_inside_of_a_preset_is_for_layers_alone(self):
        with dn.intercept("lean") as outer, dn.intercept(DropIT(0.5)) as inner:
            cases.cached(Paths())
        self.assertEqual(cases.kinds(inner), ["Dense", "Dense"])
        self.assertEqual(cases.kinds(outer), ["gelu", "LayerNorm", "gelu", "relu"])
        with dn.intercept(DropIT(0.5)) as outer, dn.intercept("lean") as inner:
            cases.cached(Paths())
        self.assertEmpty(outer.layers)
        self.assertLen(inner.layers, 6)

    def test_the_baseline_inside_changes_nothing(self):
        with dn.intercept("lean") as outer, dn.intercept("baseline"):
            cases.cached(Paths())
        self.assertLen(outer.layers, 6)

    @parameterized.parameters(
        dn.LayerNorm(),
        nn.Sequential([nn.Dense(16), dn.Dropout(0.5, deterministic=False)]),
        cases.Dense(dnn.gelu),
    )
    def test_what_is_compact_already_stays_as_it_is(self, model):
        expected, gradients = cases.run(model, cases.X)
        before = cases.cached(model)
        with dn.intercept(cases.ONLY_CODES) as report:
            actual, same = cases.run(model, cases.X)
            self.assertEqual(cases.cached(model), before)
        self.assertEqual((report.layers, report.unreached), ([], ()))
        chex.assert_trees_all_equal((actual, same), (expected, gradients))


def _resnet():
    return jax_resnet.ResNet(
        jax_resnet.ResNetBlock, stage_sizes=[1], hidden_sizes=(8,), n_classes=4
    )


def _transformer():
    config = TNTConfig(
        *(4, 1, 16, 4, 2),
        **{"inner_dim": 8, "inner_heads": 2, "inner_dim_head": 4, "inner_r": 2},
        **{"outer_dim": 16, "outer_heads": 2, "outer_dim_head": 8, "outer_r": 2},
    )
    return TransformerInTransformer(config)


class ThirdPartyTest(cases.PresetTestCase):
    @parameterized.parameters(
        # The stem, two convolutions and that of the skip connection.
        (_resnet, {"BatchNorm": 4, "Conv": 3, "Dense": 1, "relu": 3, "max_pool": 1}),
        (_transformer, {"LayerNorm": 4, "SelfAttention": 2, "gelu": 2}),
    )
    def test_as_published(self, make, expected_kinds):
        model, x = make(), cases.numbers(2, 16, 16, 3)
        expected, gradients = cases.run(model, x)
        before = cases.cached(model, x)
        with dn.intercept(cases.LEAN_EXACT) as report:
            actual, near = cases.run(model, x)
        jax.tree.map(reference.assert_same_bits, actual, expected)
        self.assert_near(near, gradients, 0.05)
        self.assertEmpty(report.unreached)
        kinds = cases.kinds(report)
        found = {kind: kinds.count(kind) for kind in expected_kinds}
        self.assertEqual(found, expected_kinds)
        with dn.intercept("lean"):
            self.assertLess(cases.cached(model, x), 0.3 * before)

    def test_models_of_nnx_are_left_alone(self):
        model = FeedForward(nnx.Rngs(0), 16, 32)
        before = cases.residual(model, cases.X)
        with dn.intercept("lean") as report:
            self.assertEqual(cases.residual(model, cases.X), before)
        self.assertEmpty(report.layers)


class Wrapped(nn.Module):
    """Layers whose kernels are normalised."""

    @nn.compact
    def __call__(self, x):
        x = nn.WeightNorm(nn.Dense(4, name="first"))(x)
        return nn.WeightNorm(nn.Dense(3, name="second"))(x)


class WrappedTest(parameterized.TestCase):
    def test_the_first_layer_is_skipped_under_a_wrapper(self):
        model, x = Wrapped(), jnp.ones((2, 16))
        variables = model.init(jax.random.key(0), x)
        with dn.intercept(DropIT()) as report:
            jax.make_jaxpr(model.apply)(variables, x)
        self.assertEqual([layer.path for layer in report.layers], ["second"])


if __name__ == "__main__":
    absltest.main()
