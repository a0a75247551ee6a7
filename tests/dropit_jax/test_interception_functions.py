import copy
import dataclasses
import functools
import pickle
import threading
import types
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized
from jax.nn import gelu

from dropit_jax import layer_presets
from dropit_jax import linen as dn
from tests.dropit_jax import interception_cases as cases

# What one of the transformers is made of; Flax has announced the end of it.
pytestmark = pytest.mark.filterwarnings("ignore:SelfAttention will be deprecated")

_TABLE = cases.TABLE  # in the globals of the models here


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
        return cases.Dense(function=nn.silu)(x)


# What comes to a function of 8 bits, each in its own way, and its name.
_WAYS = {
    "looked up": (cases.Dense(lambda x: jax.nn.gelu(x)), "gelu"),  # noqa: PLW0108
    "keyword": (cases.Dense(lambda x: nn.gelu(approximate=False, x=x)), "gelu"),
    "field": (cases.Dense(), "gelu"),
    "partial": (cases.Dense(functools.partial(nn.gelu, approximate=False)), "gelu"),
    "sequence": (nn.Sequential([nn.Dense(16), nn.sigmoid]), "sigmoid"),
    "swish": (cases.Dense(jax.nn.swish), "silu"),
    "file": (InTheFile(), "gelu"),
    "file of a field": (cases.Dense(lambda x: gelu(x)), "gelu"),  # noqa: PLW0108
    "other file": (InOtherFile(), "silu"),
    "table": (InTable(), "gelu"),
    "setup": (InSetup(), "gelu"),
    "helper": (InHelper(), "tanh"),
    "argument": (AsArgument(), "silu"),
}


class WaysTest(cases.PresetTestCase):
    @parameterized.named_parameters((name, *way) for name, way in _WAYS.items())
    def test_functions_are_caught(self, model, name):
        before = cases.cached(model)
        with dn.intercept(cases.ONLY_CODES) as report:
            self.assertEqual(cases.cached(model), cases.CODES)
        self.assertGreaterEqual(before, 4 * cases.CODES)
        path = "Dense_0" if isinstance(model, AsArgument) else ""
        layer = dn.InterceptedLayer(
            *(path, name, (4, 16), cases.X.dtype, 4 * cases.CODES, cases.CODES)
        )
        self.assertEqual(report.layers, [layer])
        self.assertEmpty(report.unreached)
        self.assertEqual(cases.cached(model), before)


def _kept(function):
    return cases.residual(function, cases.X)


class PatchesTest(cases.PresetTestCase):
    def test_only_who_is_called_by_a_module_can_tell(self):
        plain, seen = jax.nn.relu, []

        class Look(nn.Module):
            @nn.compact
            def __call__(self, x):
                seen.append((nn.relu, jax.nn.relu, jnp.tanh))
                return cases.Dense()(x)

        with dn.intercept("lean"):
            Look().init(jax.random.key(0), cases.X)
            self.assertIs(nn.relu, jax.nn.relu)
            self.assertIs(nn.relu, plain)
            self.assertIsNot(seen[0][0], plain)
            self.assertIs(seen[0][0], seen[0][1])
            self.assertEqual(
                cases.residual(gelu, cases.X), cases.residual(jax.nn.gelu, cases.X)
            )
            self.assertEqual(nn.relu.__name__, seen[0][0].__name__)
        # What a model keeps for itself is the function, everywhere else.
        relu, _, tanh = seen[0]
        self.assertEqual(
            cases.residual(relu, cases.X), cases.residual(jax.nn.relu, cases.X)
        )
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
            bound(cases.X)
        self.assertEqual(bound.functions, (jax.nn.relu,))
        with dn.intercept("lean") as report:
            with pytest.raises(RuntimeError):
                bound(cases.X)
            self.assertEqual(bound.functions, (jax.nn.relu,))
            self.assertEqual(
                cases.residual(nn.gelu, cases.X), cases.residual(jax.nn.gelu, cases.X)
            )
        self.assertEmpty(report.layers)

    def test_other_threads_see_nothing_and_have_contexts_of_their_own(self):
        before = cases.cached(cases.Dense())
        entered, left, results = threading.Event(), threading.Event(), []

        def other():
            results.append(cases.cached(cases.Dense()))
            with dn.intercept(cases.ONLY_CODES):
                results.append(cases.cached(InTheFile()))
                entered.set()
                left.wait(60)
                # The main thread is outside again.
                results.append(cases.cached(cases.Dense()))
            results.append(cases.is_untouched())

        thread = threading.Thread(target=other)
        with dn.intercept(cases.ONLY_CODES):
            self.assertEqual(cases.cached(cases.Dense()), cases.CODES)
            thread.start()
            entered.wait(60)
        self.assertEqual(cases.cached(InTheFile()), before)
        self.assertEqual(cases.cached(cases.Dense()), before)
        left.set()
        thread.join()
        self.assertEqual(results, [before, cases.CODES, cases.CODES, True])


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
        cases.Dense(_default),
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
    "no twin": (cases.Dense(nn.softplus), ("", "softplus", "no compact twin")),
    "no twin, looked up": (
        cases.Dense(lambda x: nn.softmax(x)),  # noqa: PLW0108
        ("", "softmax", "no compact twin"),
    ),
    "mathematics": (
        cases.Dense(lambda x: jnp.tanh(x)),  # noqa: PLW0108
        ("", "jnp.tanh", "looked up in jax.numpy, not in jax.nn or flax.linen"),
    ),
    "slope": (
        cases.Dense(lambda x: nn.leaky_relu(x, jnp.float32(0.1))),
        ("", "leaky_relu", "its negative_slope is an array"),
    ),
    "window": (
        cases.Dense(lambda x: nn.max_pool(jnp.ones((1, 300, 1)), (300,)) + x),
        ("", "max_pool", "a window of more than 256 elements"),
    ),
}


_REPORT = """\
layer                         kind       input           before  after
LayerNorm_0                   LayerNorm  float32[4, 16]  256     96
.                             relu       float32[4, 16]  256     8
1 layers, 1 functions, bytes                             512     104

not reached           why
.            softmax  no compact twin"""


class UnreachedTest(cases.PresetTestCase):
    @parameterized.named_parameters((name, *how) for name, how in _UNREACHED.items())
    def test_reasons(self, model, *expected):
        x = cases.numbers(2, 3, 16)
        with dn.intercept(cases.LEAN, skip_first=False) as report:
            jax.eval_shape(functools.partial(cases.init, model), x)
        self.assertEqual(report.unreached, expected)
        nothing = dataclasses.replace(cases.BITS_EXACT, dropit=None, one_bit=False)
        for other in (cases.LEAN.dropit, nothing):  # what they are not for is no matter
            with dn.intercept(other, skip_first=False) as report:
                jax.eval_shape(functools.partial(cases.init, model), x)
            self.assertEmpty(report.unreached)

    def test_what_is_excluded_is_no_matter(self):
        with dn.intercept("lean", exclude="") as report:
            jax.eval_shape(functools.partial(cases.init, OnClass()), cases.X)
            jax.eval_shape(functools.partial(cases.init, nn.LayerNorm()), cases.X)
        self.assertEmpty(report.unreached)

    def test_a_subclass_that_calls_flaxs_is_reached(self):
        with dn.intercept("lean") as report:
            cases.cached(DoubledNorm())
        self.assertEqual(cases.kinds(report), ["DoubledNorm"])
        self.assertEmpty(report.unreached)

    def test_blocks_are_not_recomputed(self):
        for preset in (
            layer_presets.layer_preset("lean", remat="blocks"),
            layer_presets.layer_preset("baseline", remat="blocks"),
        ):
            with dn.intercept(preset) as report:
                pass
            why = "blocks of a model that is there: put flax.linen.remat into it"
            self.assertEqual(report.unreached, (("", "remat='blocks'", why),))

    def test_table(self):
        with dn.intercept("lean") as report:
            cases.cached(cases.Dense(lambda x: nn.softmax(nn.relu(nn.LayerNorm()(x)))))
        self.assertEqual(str(report), _REPORT)


if __name__ == "__main__":
    absltest.main()
