import copy
import dataclasses
import functools
import math
import pickle
import threading
import types
from typing import Any

import chex
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import jax_resnet
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from attnax import FeedForward
from flax import nnx
from jax.extend.core import Var
from jax.nn import gelu
from transformer_in_transformer_flax import TNTConfig, TransformerInTransformer

from dropit_jax import DropIT, presets
from dropit_jax import linen as dn
from dropit_jax import nn as dnn
from tests.dropit_jax import reference

# What one of the transformers is made of; Flax has announced the end of it.
pytestmark = pytest.mark.filterwarnings("ignore:SelfAttention will be deprecated")

_EXACT = DropIT(0.0)
_LEAN = presets.preset("lean")
# Without the error of the products.
_LEAN_EXACT = dataclasses.replace(_LEAN, dropit=_EXACT, conv=_EXACT)
_BITS_EXACT = dataclasses.replace(_LEAN_EXACT, eight_bit=False)
_ONLY_CODES = dataclasses.replace(_LEAN, dropit=None, conv=None)

_TABLE = {"exact": functools.partial(nn.gelu, approximate=False), "relu": nn.relu}


def _input(*shape, dtype=jnp.float32):
    x = np.random.default_rng(0).normal(size=shape)
    return jnp.asarray(np.round(x, 1), dtype)  # with ties


_X = _input(4, 16)
_CODES = _X.size  # of it, a byte an element
_BITS = _X.size // 8


class Convolutional(nn.Module):
    activation: Any = nn.relu

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), name="stem")(x)
        x = nn.BatchNorm(use_running_average=False, name="norm")(x)
        x = nn.max_pool(self.activation(x), (2, 2), (2, 2))
        x = nn.relu(nn.Conv(16, (3, 3), name="conv")(x))
        x = nn.Dropout(0.5, deterministic=False, name="drop")(x)
        return nn.Dense(4, name="head")(x.mean((1, 2)))


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, name="embed")(x)
        y = nn.LayerNorm(name="norm_1")(x)
        y = nn.MultiHeadDotProductAttention(
            2, dropout_rate=0.1, deterministic=False, name="mix"
        )(y)
        x = x + nn.Dropout(0.1, deterministic=False, name="drop")(y)
        y = gelu(nn.Dense(32, name="up")(nn.RMSNorm(name="norm_2")(x)))
        return x + nn.Dense(16, name="down")(y)


_RNGS = {"dropout": jax.random.key(1), "dropit": jax.random.key(2)}


def _variables(model, shape=(4, 16)):
    """Faster than to compile the initialisation."""
    rng = np.random.default_rng(1)
    rngs = {"params": jax.random.key(0), **_RNGS}
    shapes = jax.eval_shape(model.init, rngs, jnp.zeros(shape))
    return jax.tree.map(
        lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape) ** 2 + 0.1, s.dtype),
        shapes,
    )


def _apply(model, variables, x, **kwargs):
    state = [name for name in variables if name != "params"]
    return model.apply(variables, x, rngs=_RNGS, mutable=state, **kwargs)


def _run(model, x, **kwargs):
    """Output, updates, and the gradients of parameters, by name, and input."""

    @jax.jit
    def run(variables, x):
        def loss(params, x):
            out = _apply(model, variables | {"params": params}, x, **kwargs)
            weights = jnp.cos(jnp.arange(out[0].size)).reshape(out[0].shape)
            return (out[0] * weights).astype(jnp.float32).sum(), out

        gradient = jax.grad(loss, (0, 1), has_aux=True)
        gradients, out = gradient(variables["params"], x)
        return out, gradients

    out, (of_params, of_x) = run(_variables(model, x.shape), x)
    of_params = flax.traverse_util.flatten_dict(of_params, sep="/")
    return out, {"x": of_x, **of_params}


def _residual(function, *args):
    """What a pullback keeps that is no argument of the function, in bytes."""
    pullback = lambda *args: jax.vjp(function, *args)[1]  # noqa: E731
    jaxpr = jax.make_jaxpr(pullback)(*args).jaxpr
    kept = {v for v in jaxpr.outvars if isinstance(v, Var)} - set(jaxpr.invars)
    return sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in kept)


def _cached(model, x=_X, **kwargs):
    run = lambda variables, x: _apply(model, variables, x, **kwargs)[0]  # noqa: E731
    return _residual(run, _variables(model, x.shape), x)


def _kinds(report):
    return [layer.kind for layer in report.layers]


def _is_untouched():
    return (
        type(jax.nn) is type(nn) is type(jnp) is types.ModuleType
        and nn.relu is jax.nn.relu
        and gelu is jax.nn.gelu
        and _TABLE["relu"] is jax.nn.relu
        and type(_TABLE["exact"].func) is types.FunctionType
    )


class PresetTestCase(parameterized.TestCase):
    def tearDown(self):
        super().tearDown()
        self.assertTrue(_is_untouched())

    def assert_near(self, actual, expected, tolerance):
        """Gradients, relative to the largest of them."""
        scale = max(float(jnp.linalg.norm(g)) for g in expected.values())
        for name, gradient in expected.items():
            norm = max(float(jnp.linalg.norm(gradient)), 0.05 * scale)
            error = float(jnp.linalg.norm(actual[name] - gradient))
            self.assertLess(error, tolerance * norm, name)


class ArgumentsTest(PresetTestCase):
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
            return jax.grad(lambda v: Dense().apply(v, _X).sum())(variables)

        variables = _variables(Dense())
        gradient(variables)
        with dn.intercept("baseline", only="none") as report:
            self.assertTrue(_is_untouched())
            gradient(variables)
        self.assertLen(traces, 1)
        self.assertEqual((report.layers, report.unreached), ([], ()))

    def test_traces_are_shared_where_presets_are_alike(self):
        traces, variables = [], _variables(Dense())

        @jax.jit
        def gradient(variables):
            traces.append(None)
            return jax.grad(lambda v: Dense().apply(v, _X).sum())(variables)

        for given, count in (
            ("baseline", 1),
            ("lean", 2),
            (presets.preset("lean"), 2),
            (_LEAN.dropit, 3),
            (presets.preset("lean", rate=0.5), 4),
            ("dropit", 5),
            ("baseline", 5),
        ):
            with dn.intercept(given):
                jax.eval_shape(gradient, variables)
            self.assertLen(traces, count)


class Dense(nn.Module):
    function: Any = nn.gelu

    @nn.compact
    def __call__(self, x):
        return self.function(nn.Dense(16, name="dense")(x))


# (model, shape of the input, what runs compact in "lean")
_MODELS = {
    "convolutional": (
        Convolutional(),
        (2, 8, 8, 3),
        ["BatchNorm", "relu", "max_pool", "Conv", "relu", "Dropout", "Dense"],
    ),
    "transformer": (
        Transformer(),
        (2, 8, 16),
        [
            *("LayerNorm", "DenseGeneral", "DenseGeneral", "DenseGeneral"),
            *("MultiHeadDotProductAttention", "DenseGeneral", "Dropout", "RMSNorm"),
            *("Dense", "gelu", "Dense"),
        ],
    ),
}


class WholeModelsTest(PresetTestCase):
    @parameterized.parameters(*_MODELS)
    def test_output_is_the_models_and_gradients_are_near(self, name):
        model, shape, kinds = _MODELS[name]
        x = _input(*shape)
        expected, gradients = _run(model, x)
        # Dropout, pooling and rectifiers change no bit; 8 bits change some.
        for preset, tolerance in ((_BITS_EXACT, 1e-5), (_LEAN_EXACT, 0.03)):
            with dn.intercept(preset) as report:
                actual, near = _run(model, x)
            jax.tree.map(reference.assert_same_bits, actual, expected)
            self.assert_near(near, gradients, tolerance)
            self.assertEmpty(report.unreached)
        self.assertEqual(_kinds(report), kinds)

    @parameterized.product(name=tuple(_MODELS), preset=("dropit", "lean"))
    def test_the_report_is_all_that_is_cached(self, name, preset):
        model, shape, _ = _MODELS[name]
        x = _input(*shape)
        before = _cached(model, x)
        with dn.intercept(preset) as report:
            after = _cached(model, x)
        if preset == "lean":
            self.assertEqual(after, report.bytes_after)
        self.assertLess(after, {"dropit": 0.95, "lean": 0.25}[preset] * before)

    def test_bfloat16(self):
        model = nn.Sequential([nn.Dense(16, dtype=jnp.bfloat16), nn.gelu, nn.relu])
        expected, gradients = _run(model, _X)
        with dn.intercept(_LEAN_EXACT) as report:
            actual, near = _run(model, _X)
            casts = 2 * (16 * 16 + _X.size)  # of the kernel and the input
            self.assertEqual(_cached(model), casts + _CODES + _BITS)
        reference.assert_same_bits(actual[0], expected[0])
        self.assert_near(near, gradients, 0.02)
        rows = [(r.kind, r.dtype, r.bytes_before) for r in report.layers]
        dtype = jnp.dtype("bfloat16")
        expected = [("gelu", dtype, 2 * _CODES), ("relu", dtype, 2 * _CODES)]
        self.assertEqual(rows, expected)


def _module_of(code):
    """A file of a model, as if imported."""
    module = types.ModuleType("a_model")
    exec(code, vars(module))
    return module


_OTHER_FILE = _module_of("""
from jax.nn import silu as swish
def gate(x):
    return swish(x)
""")
gate = _OTHER_FILE.gate


class InTheFile(nn.Module):
    @nn.compact
    def __call__(self, x):
        return gelu(nn.Dense(16)(x))


class InOtherFile(nn.Module):
    @nn.compact
    def __call__(self, x):
        return gate(nn.Dense(16)(x))


class InTable(nn.Module):
    @nn.compact
    def __call__(self, x):
        return _TABLE["exact"](nn.Dense(16)(x))


class InSetup(nn.Module):
    def setup(self):
        self.dense = nn.Dense(16)
        self.functions = {"a": [_TABLE["exact"]], "b": gelu}

    def __call__(self, x):
        return self.functions["a"][0](self.dense(x))


class InHelper(nn.Module):
    @nn.compact
    def __call__(self, x):
        return self.activate(nn.Dense(16)(x))

    def activate(self, x):
        return jax.jit(lambda x: nn.tanh(x))(x)  # noqa: PLW0108


class AsArgument(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Dense(function=nn.silu)(x)


# What comes to a function of 8 bits, each in its own way, and its name.
_WAYS = {
    "looked up": (Dense(lambda x: jax.nn.gelu(x)), "gelu"),  # noqa: PLW0108
    "keyword": (Dense(lambda x: nn.gelu(approximate=False, x=x)), "gelu"),
    "field": (Dense(), "gelu"),
    "partial": (Dense(functools.partial(nn.gelu, approximate=False)), "gelu"),
    "sequence": (nn.Sequential([nn.Dense(16), nn.sigmoid]), "sigmoid"),
    "swish": (Dense(jax.nn.swish), "silu"),
    "file": (InTheFile(), "gelu"),
    "file of a field": (Dense(lambda x: gelu(x)), "gelu"),  # noqa: PLW0108
    "other file": (InOtherFile(), "silu"),
    "table": (InTable(), "gelu"),
    "setup": (InSetup(), "gelu"),
    "helper": (InHelper(), "tanh"),
    "argument": (AsArgument(), "silu"),
}


class WaysTest(PresetTestCase):
    @parameterized.named_parameters((name, *way) for name, way in _WAYS.items())
    def test_functions_are_caught(self, model, name):
        before = _cached(model)
        with dn.intercept(_ONLY_CODES) as report:
            self.assertEqual(_cached(model), _CODES)
        self.assertGreaterEqual(before, 4 * _CODES)
        path = "Dense_0" if isinstance(model, AsArgument) else ""
        layer = dn.InterceptedLayer(
            *(path, name, (4, 16), _X.dtype, 4 * _CODES, _CODES)
        )
        self.assertEqual(report.layers, [layer])
        self.assertEmpty(report.unreached)
        self.assertEqual(_cached(model), before)


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


class TransformedTest(PresetTestCase):
    @parameterized.named_parameters((name, *how) for name, how in _LIFTED.items())
    def test_lifted(self, block, times):
        model = Lifted(block)
        expected, gradients = _run(model, _X)
        with dn.intercept(_LEAN_EXACT) as report:
            actual, near = _run(model, _X)
            self.assertEqual(_kinds(report), 2 * ["LayerNorm", "relu", "Dense"])
            if times:
                self.assertEqual(_cached(model), times * report.bytes_after)
                self.assertEqual(_cached(model), times * report.bytes_after)
        self.assertEqual(report.layers[4].path, "two")
        jax.tree.map(reference.assert_same_bits, actual, expected)
        self.assert_near(near, gradients, 0.02)

    def test_a_function_that_is_jitted_itself(self):
        before = _residual(_jitted, _X), _cached(Jitted())
        with dn.intercept(_ONLY_CODES):
            for _ in range(2):
                # Nobody calls it, and a module does.
                after = _residual(_jitted, _X), _cached(Jitted())
                self.assertEqual(after, (before[0], _CODES))
        with dn.intercept(_ONLY_CODES, exclude=[""]) as report:
            self.assertEqual(_cached(Jitted()), before[1])
        self.assertEmpty(report.layers)
        self.assertEqual((_residual(_jitted, _X), _cached(Jitted())), before)

    def test_a_compiled_step_is_traced_again_on_the_other_side(self):
        variables = _variables(Dense())

        @jax.jit
        def step(variables):
            return jax.grad(lambda v: Dense().apply(v, _X).sum())(variables)

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

        expected = Physical().apply({}, _X)
        with dn.intercept("lean") as report:
            actual = Physical().apply({}, _X)
        self.assertEqual(_kinds(report), ["gelu", "relu"])
        chex.assert_trees_all_close(actual, expected, atol=1 / 400)


class Paths(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = Dense(name="a")(nn.Dense(16, name="first")(x))
        x = nn.LayerNorm(name="norm")(x)
        return nn.relu(Dense(name="b")(x))


class PathsTest(PresetTestCase):
    @parameterized.parameters(
        ({}, ["a/dense", "a", "norm", "b/dense", "b", ""]),
        ({"only": ["a", "norm"]}, ["a", "norm"]),
        ({"only": "b*"}, ["b/dense", "b"]),
        ({"exclude": ["b", "*/*"]}, ["a", "norm", ""]),
        ({"only": "first", "skip_first": False}, ["first"]),
    )
    def test_globs(self, arguments, expected):
        with dn.intercept("lean", **arguments) as report:
            _cached(Paths())
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
            _cached(Paths())


class NestedTest(PresetTestCase):
    def test_the_inner_decides_what_it_has_to_do_with(self):
        with dn.intercept("lean") as outer:
            with dn.intercept("dropit", exclude="a*") as inner:
                _cached(Paths())
            kinds = {(layer.path, layer.kind) for layer in outer.layers}
            # No bits in the outer one, and none of 8 in the inner one.
            by_outer = {("a/dense", "Dense"), ("a", "gelu"), ("b", "gelu")}
            self.assertEqual(kinds, {*by_outer, ("norm", "LayerNorm")})
            self.assertEqual(_kinds(inner), ["Dense", "relu"])
            _cached(Paths())
        self.assertIn(("", "relu"), {(r.path, r.kind) for r in outer.layers})

    def test_a_policy_inside_of_a_preset_is_for_layers_alone(self):
        with dn.intercept("lean") as outer, dn.intercept(DropIT(0.5)) as inner:
            _cached(Paths())
        self.assertEqual(_kinds(inner), ["Dense", "Dense"])
        self.assertEqual(_kinds(outer), ["gelu", "LayerNorm", "gelu", "relu"])
        with dn.intercept(DropIT(0.5)) as outer, dn.intercept("lean") as inner:
            _cached(Paths())
        self.assertEmpty(outer.layers)
        self.assertLen(inner.layers, 6)

    def test_the_baseline_inside_changes_nothing(self):
        with dn.intercept("lean") as outer, dn.intercept("baseline"):
            _cached(Paths())
        self.assertLen(outer.layers, 6)

    @parameterized.parameters(
        dn.LayerNorm(),
        nn.Sequential([nn.Dense(16), dn.Dropout(0.5, deterministic=False)]),
        Dense(dnn.gelu),
    )
    def test_what_is_compact_already_stays_as_it_is(self, model):
        expected, gradients = _run(model, _X)
        before = _cached(model)
        with dn.intercept(_ONLY_CODES) as report:
            actual, same = _run(model, _X)
            self.assertEqual(_cached(model), before)
        self.assertEqual((report.layers, report.unreached), ([], ()))
        chex.assert_trees_all_equal((actual, same), (expected, gradients))


class PatchesTest(PresetTestCase):
    def test_only_who_is_called_by_a_module_can_tell(self):
        plain, seen = jax.nn.relu, []

        class Look(nn.Module):
            @nn.compact
            def __call__(self, x):
                seen.append((nn.relu, jax.nn.relu, jnp.tanh))
                return Dense()(x)

        with dn.intercept("lean"):
            Look().init(jax.random.key(0), _X)
            self.assertIs(nn.relu, jax.nn.relu)
            self.assertIs(nn.relu, plain)
            self.assertIsNot(seen[0][0], plain)
            self.assertIs(seen[0][0], seen[0][1])
            self.assertEqual(_residual(gelu, _X), _residual(jax.nn.gelu, _X))
            self.assertEqual(nn.relu.__name__, seen[0][0].__name__)
        # What a model keeps for itself is the function, everywhere else.
        relu, _, tanh = seen[0]
        self.assertEqual(_residual(relu, _X), _residual(jax.nn.relu, _X))
        self.assertIs(relu.defjvp.__self__, jax.nn.relu)
        for kept in (relu, tanh):
            for copied in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
                self.assertIn(copied, (jax.nn.relu, jnp.tanh))
        self.assertEqual(repr(relu), repr(jax.nn.relu))

    def test_assignments_are_kept(self):
        with dn.intercept("lean"):
            nn.selu, before = nn.elu, nn.selu
        self.assertIs(nn.selu, nn.elu)
        nn.selu = before

    def test_exceptions_leave_nothing_behind(self):
        class Fails(nn.Module):
            functions: Any = (nn.relu,)

            @nn.compact
            def __call__(self, x):
                raise RuntimeError(self.functions)

        bound = Fails().bind({})
        with pytest.raises(RuntimeError), dn.intercept("lean"):
            bound(_X)
        self.assertEqual(bound.functions, (jax.nn.relu,))
        with dn.intercept("lean") as report:
            with pytest.raises(RuntimeError):
                bound(_X)
            self.assertEqual(bound.functions, (jax.nn.relu,))
            self.assertEqual(_residual(nn.gelu, _X), _residual(jax.nn.gelu, _X))
        self.assertEmpty(report.layers)

    def test_other_threads_see_nothing_and_have_contexts_of_their_own(self):
        before = _cached(Dense())
        entered, left, results = threading.Event(), threading.Event(), []

        def other():
            results.append(_cached(Dense()))
            with dn.intercept(_ONLY_CODES):
                results.append(_cached(InTheFile()))
                entered.set()
                left.wait(60)
                # The main thread is outside again.
                results.append(_cached(Dense()))
            results.append(_is_untouched())

        thread = threading.Thread(target=other)
        with dn.intercept(_ONLY_CODES):
            self.assertEqual(_cached(Dense()), _CODES)
            thread.start()
            entered.wait(60)
        self.assertEqual(_cached(InTheFile()), before)
        self.assertEqual(_cached(Dense()), before)
        left.set()
        thread.join()
        self.assertEqual(results, [before, _CODES, _CODES, True])


def _default(x, act=nn.gelu, *, last=nn.relu):
    return last(act(x))


class OwnNorm(nn.LayerNorm):
    @nn.compact
    def __call__(self, x):
        return x - x.mean()


class OwnDense(nn.Dense):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", self.kernel_init, (16, self.features))


class DoubledNorm(nn.LayerNorm):
    @nn.compact
    def __call__(self, x):
        return 2 * super().__call__(x)


@dataclasses.dataclass(frozen=True)
class Config:
    activation: Any = nn.silu
    name: str = "config"


class Configured(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, last=nn.relu):
        return last(self.config.activation(x))


class OnClass(nn.Module):
    attribute = staticmethod(nn.tanh)

    @nn.compact
    def __call__(self, x):
        return self.attribute(x)


def _with_closure():
    function = nn.sigmoid

    class InClosure(nn.Module):
        @nn.compact
        def __call__(self, x):
            return function(x)

    return InClosure()


def _attention(**fields):
    return nn.MultiHeadDotProductAttention(2, **fields)


def attend_evenly(query, key, value):
    return value + 0 * query + 0 * key


class Attend(nn.Module):
    attention: Any
    sow_weights: bool = False

    @nn.compact
    def __call__(self, x):
        return self.attention(x, sow_weights=self.sow_weights)


# (model, (path, what, why) of what is not reached)
_UNREACHED = {
    "stateful product": (
        nn.Dense(16, dot_general_cls=nn.Fp8DirectDotGeneralOp),
        ("", "Dense", "its dot_general_cls has a state"),
    ),
    "own layer": (OwnDense(16), ("", "OwnDense", "a __call__ of its own")),
    "own norm": (OwnNorm(), ("", "OwnNorm", "a __call__ of its own")),
    "other attention": (
        _attention(attention_fn=attend_evenly),
        *[("", "MultiHeadDotProductAttention", "its attention_fn is attend_evenly")],
    ),
    "sown weights": (
        Attend(_attention(), sow_weights=True),
        ("attention", "MultiHeadDotProductAttention", "it sows its weights"),
    ),
    "einsum of attention": (
        _attention(
            qk_attn_weights_einsum_cls=lambda: jnp.einsum,
            attn_weights_value_einsum_cls=lambda: jnp.einsum,
        ),
        *[("", "MultiHeadDotProductAttention", "it has qk_attn_weights_einsum_cls")],
    ),
    "closure": (_with_closure(), ("", "sigmoid", "in the closure of __call__")),
    "defaults": (
        Dense(_default),
        ("", "gelu", "a default argument of _default"),
        ("", "relu", "a default argument of _default"),
    ),
    "configuration": (
        Configured(Config()),
        ("", "relu", "a default argument of __call__"),
        ("", "silu", "in the field config, a Config"),
    ),
    "class": (OnClass(), ("", "tanh", "an attribute of the class OnClass")),
    "cell": (
        nn.RNN(nn.OptimizedLSTMCell(16)),
        ("cell", "OptimizedLSTMCell", "no compact twin"),
    ),
    "weight norm": (
        nn.WeightNorm(nn.Dense(16)),
        ("", "WeightNorm", "no compact twin"),
    ),
    "learned slope": (nn.PReLU(), ("", "PReLU", "no compact twin")),
    "no twin": (Dense(nn.softplus), ("", "softplus", "no compact twin")),
    "no twin, looked up": (
        Dense(lambda x: nn.softmax(x)),  # noqa: PLW0108
        ("", "softmax", "no compact twin"),
    ),
    "mathematics": (
        Dense(lambda x: jnp.tanh(x)),  # noqa: PLW0108
        ("", "jnp.tanh", "looked up in jax.numpy, not in jax.nn or flax.linen"),
    ),
    "slope": (
        Dense(lambda x: nn.leaky_relu(x, jnp.float32(0.1))),
        ("", "leaky_relu", "its negative_slope is an array"),
    ),
    "window": (
        Dense(lambda x: nn.max_pool(jnp.ones((1, 300, 1)), (300,)) + x),
        ("", "max_pool", "a window of more than 256 elements"),
    ),
}


class UnreachedTest(PresetTestCase):
    @parameterized.named_parameters((name, *how) for name, how in _UNREACHED.items())
    def test_reasons(self, model, *expected):
        x = _input(2, 3, 16)
        with dn.intercept(_LEAN, skip_first=False) as report:
            jax.eval_shape(functools.partial(_init, model), x)
        self.assertEqual(report.unreached, expected)
        nothing = dataclasses.replace(_BITS_EXACT, dropit=None, one_bit=False)
        for other in (_LEAN.dropit, nothing):  # what they are not for is no matter
            with dn.intercept(other, skip_first=False) as report:
                jax.eval_shape(functools.partial(_init, model), x)
            self.assertEmpty(report.unreached)

    def test_what_is_excluded_is_no_matter(self):
        with dn.intercept("lean", exclude="") as report:
            jax.eval_shape(functools.partial(_init, OnClass()), _X)
            jax.eval_shape(functools.partial(_init, nn.LayerNorm()), _X)
        self.assertEmpty(report.unreached)

    def test_a_subclass_that_calls_flaxs_is_reached(self):
        with dn.intercept("lean") as report:
            _cached(DoubledNorm())
        self.assertEqual(_kinds(report), ["DoubledNorm"])
        self.assertEmpty(report.unreached)

    def test_blocks_are_not_recomputed(self):
        for preset in (
            presets.preset("lean", remat="blocks"),
            presets.preset("baseline", remat="blocks"),
        ):
            with dn.intercept(preset) as report:
                pass
            why = "blocks of a model that is there: put flax.linen.remat into it"
            self.assertEqual(report.unreached, (("", "remat='blocks'", why),))

    def test_table(self):
        with dn.intercept("lean") as report:
            _cached(Dense(lambda x: nn.softmax(nn.relu(nn.LayerNorm()(x)))))
        self.assertEqual(str(report), _REPORT)


_REPORT = """\
layer                         kind       input           before  after
LayerNorm_0                   LayerNorm  float32[4, 16]  256     96
.                             relu       float32[4, 16]  256     8
1 layers, 1 functions, bytes                             512     104

not reached           why
.            softmax  no compact twin"""


def _init(model, x):
    return model.init({"params": jax.random.key(0), **_RNGS}, x)


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


class ThirdPartyTest(PresetTestCase):
    @parameterized.parameters(
        # The stem, two convolutions and that of the skip connection.
        (_resnet, {"BatchNorm": 4, "Conv": 3, "Dense": 1, "relu": 3, "max_pool": 1}),
        (_transformer, {"LayerNorm": 4, "SelfAttention": 2, "gelu": 2}),
    )
    def test_as_published(self, make, expected_kinds):
        model, x = make(), _input(2, 16, 16, 3)
        expected, gradients = _run(model, x)
        before = _cached(model, x)
        with dn.intercept(_LEAN_EXACT) as report:
            actual, near = _run(model, x)
        jax.tree.map(reference.assert_same_bits, actual, expected)
        self.assert_near(near, gradients, 0.05)
        self.assertEmpty(report.unreached)
        kinds = _kinds(report)
        found = {kind: kinds.count(kind) for kind in expected_kinds}
        self.assertEqual(found, expected_kinds)
        with dn.intercept("lean"):
            self.assertLess(_cached(model, x), 0.3 * before)

    def test_models_of_nnx_are_left_alone(self):
        model = FeedForward(nnx.Rngs(0), 16, 32)
        before = _residual(model, _X)
        with dn.intercept("lean") as report:
            self.assertEqual(_residual(model, _X), before)
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
