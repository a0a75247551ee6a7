import functools
from typing import Any

import chex
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax import lax

from dropit_jax import DropIT, memory
from dropit_jax import linen as dn
from tests.dropit_jax import reference

_POLICY = DropIT(0.5)
_OTHER = DropIT(0.75)
_RANDOM = DropIT(0.5, strategy="random")

# Of 96 float32: the kept ones and a bitmap, or two for each byte of it.
_BYTES, _OTHER_BYTES = 4 * 48 + 12, 4 * 24 + 12


def _input(*shape):
    x = np.random.default_rng(0).normal(size=shape)
    return jnp.asarray(np.round(x, 1), jnp.float32)  # with ties


_X = _input(6, 16)


def _shapes(model, x=_X):
    return jax.eval_shape(model.init, jax.random.key(0), x)


def _variables(model, x=_X):
    """Faster than to compile the initialisation."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape), s.dtype),
        _shapes(model, x),
    )


def _runner(model):
    """Output, and the gradients of the parameters, as a flat dict, and of the input."""

    @jax.jit
    def run(variables, x, rngs):
        out, pullback = jax.vjp(lambda v, x: model.apply(v, x, rngs=rngs), variables, x)
        cotangent = jnp.cos(jnp.arange(out.size)).reshape(out.shape)
        return out, *pullback(cotangent.astype(out.dtype))

    def flat(variables, x=_X, rngs=None):
        out, of_variables, of_x = run(variables, x, rngs)
        params = flax.traverse_util.flatten_dict(of_variables["params"], sep="/")
        return out, params, of_x

    return flat


def _program(model, variables, x):
    """Returns the lowered text of the program that `_run` compiles."""

    def run(variables, x, cotangent):
        out, pullback = jax.vjp(model.apply, variables, x)
        return out, *pullback(cotangent)

    cotangent = jax.eval_shape(model.apply, variables, x)
    return jax.jit(run).lower(variables, x, cotangent).as_text()


def _run(model, *args, **kwargs):
    return _runner(model)(*args, **kwargs)


def _gradient(model, x=_X, **kwargs):
    return jax.grad(lambda v: model.apply(v, x, **kwargs).astype(jnp.float32).sum())


def _cached(model, x=_X, **kwargs):
    """Returns the bytes that the program of the gradient caches."""
    return memory.cached_bytes(_gradient(model, x, **kwargs), _shapes(model, x))


def _changed(actual, expected):
    """Returns the paths of the layers whose kernel has another gradient."""
    return {
        path.removesuffix("/kernel")
        for path, gradient in expected.items()
        if path.endswith("kernel") and not np.array_equal(actual[path], gradient)
    }


def _paths(report):
    return [layer.path for layer in report.layers]


class OneLayer(nn.Module):
    """A layer that is not the first."""

    layer: Any

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(x.shape[-1], name="first")(x))
        return self.layer(name="layer")(x)


class Block(nn.Module):
    dense: Any = nn.Dense

    @nn.compact
    def __call__(self, x, _=None):
        return nn.tanh(self.dense(16, name="dense")(x)), None


class Compact(nn.Module):
    dense: Any = nn.Dense

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(16, name="first")(x))
        x = nn.tanh(self.dense(16, name="second")(x))
        return self.dense(4, name="third")(x)


class Setup(nn.Module):
    """Its layers are made in another order than they are called in."""

    dense: Any = nn.Dense

    def setup(self):
        self.last = self.dense(4)
        self.between = [self.dense(16), self.dense(16)]
        self.first = nn.Dense(16)

    def __call__(self, x):
        return self.last(self.decode(nn.tanh(self.first(x))))

    def decode(self, x):
        return self.between[1](nn.tanh(self.between[0](x)))


class InSequence(nn.Module):
    dense: Any = nn.Dense

    @nn.compact
    def __call__(self, x):
        layers = [nn.Dense(16, name="first"), nn.tanh, self.dense(4, name="second")]
        return nn.Sequential(layers)(x)


class CalledTwice(nn.Module):
    dense: Any = nn.Dense

    @nn.compact
    def __call__(self, x):
        first, shared = nn.Dense(16, name="first"), self.dense(16, name="shared")
        return shared(nn.tanh(first(nn.tanh(shared(nn.tanh(first(x)))))))


class Lifted(nn.Module):
    """Both modules are in `lift`, or the second alone."""

    block: Any
    dense: Any = nn.Dense
    first: Any = Block

    @nn.compact
    def __call__(self, x):
        x, _ = self.first(name="first")(x, None)
        x, _ = self.block(self.dense, name="second")(x, None)
        return x


class Jitted(nn.Module):
    def setup(self):
        self.a, self.b = nn.Dense(16), nn.Dense(4)

    @nn.jit
    def encode(self, x):
        return self.a(x)

    def __call__(self, x):
        return self.b(self.encode(x))


_LIFTED = {
    "submodule": Block,
    "scan": nn.scan(
        Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    ),
    "remat": nn.remat(Block),
    "vmap": nn.vmap(
        Block,
        in_axes=(0, None),
        out_axes=(0, None),
        variable_axes={"params": None},
        split_rngs={"params": False},
    ),
    "jit": nn.jit(Block),
}
_ATTENTION = nn.MultiHeadDotProductAttention

# (name of the layer, its arguments, input shape)
_KINDS = (
    ("Dense", {"features": 8}, (2, 3, 16)),
    ("Dense", {"features": 8, "dtype": jnp.bfloat16}, (6, 16)),
    ("DenseGeneral", {"features": (2, 4), "axis": (-2, -1)}, (3, 4, 8)),
    ("Einsum", {"shape": (16, 8), "einsum_str": "btc,cd->btd"}, (2, 3, 16)),
    ("Conv", {"features": 4, "kernel_size": (3, 3), "strides": 2}, (2, 5, 4, 8)),
    ("ConvLocal", {"features": 4, "kernel_size": (3,), "padding": "VALID"}, (2, 6, 8)),
    ("ConvTranspose", {"features": 4, "kernel_size": (3,)}, (2, 6, 8)),
    ("MultiHeadDotProductAttention", {"num_heads": 2}, (2, 5, 16)),
)
# (model, the layers but the first)
_MODELS = (
    (Compact, {"second", "third"}),
    (Setup, {"between_0", "between_1", "last"}),
    (InSequence, {"second"}),
    (CalledTwice, {"shared"}),
    *((functools.partial(Lifted, b), {"second/dense"}) for b in _LIFTED.values()),
)


class AnyModelTest(parameterized.TestCase):
    def _check(self, plain, ours, x, expected_paths):
        """Checks that `plain` in the context has the kernel gradients of `ours`."""
        variables = _variables(plain, x)
        expected = _run(plain, variables, x)
        with dn.intercept(_POLICY) as report:
            chex.assert_trees_all_equal(_shapes(plain, x), _shapes(ours, x))
            actual = _run(plain, variables, x)
            program = _program(plain, variables, x)
        reference.assert_same_bits(actual[0], expected[0])
        reference.assert_same_bits(actual[2], expected[2])
        self.assertEqual(set(_paths(report)), expected_paths)
        self.assertEqual(_changed(actual[1], expected[1]), expected_paths)
        self.assertEqual(program, _program(ours, variables, x))
        biases = {path for path in expected[1] if path.endswith("bias")}
        chex.assert_trees_all_close(
            *({path: run[1][path] for path in biases} for run in (actual, expected)),
            rtol=1e-5,
            atol=1e-5,
        )

    @parameterized.parameters(*_KINDS)
    def test_every_kind_of_layer(self, name, arguments, shape):
        names = ("query", "key", "value", "out")
        attention = getattr(nn, name) is _ATTENTION
        self._check(
            OneLayer(functools.partial(getattr(nn, name), **arguments)),
            OneLayer(functools.partial(getattr(dn, name), **arguments, dropit=_POLICY)),
            _input(*shape),
            {f"layer/{part}" for part in names} if attention else {"layer"},
        )

    @parameterized.parameters(*_MODELS)
    def test_every_kind_of_model(self, model, paths):
        dense = functools.partial(dn.Dense, dropit=_POLICY)
        self._check(model(), model(dense=dense), _X, paths)

    def test_initialisation_is_as_without(self):
        model = OneLayer(functools.partial(nn.Einsum, (16, 8), "bc,cd->bd"))
        init = lambda: model.init(jax.random.key(0), _X)  # noqa: E731
        expected = jax.jit(init)()
        with dn.intercept(_POLICY):
            chex.assert_trees_all_equal(jax.jit(init)(), expected)

    def test_the_kernels_gradient_is_that_at_the_sparse_input(self):
        variables = _variables(InSequence())
        first = variables["params"]["first"]
        hidden = jnp.tanh(_X @ first["kernel"] + first["bias"])
        with dn.intercept(_POLICY):
            out, gradients, _ = _run(InSequence(), variables)
        cotangent = np.cos(np.arange(out.size)).reshape(out.shape)
        expected = reference.sparse(hidden, 0.5, 16).T @ cotangent
        chex.assert_trees_all_close(
            gradients["second/kernel"], expected, rtol=1e-4, atol=1e-5
        )


class FirstLayerTest(parameterized.TestCase):
    @parameterized.named_parameters(
        (name, block) for name, block in _LIFTED.items() if name != "jit"
    )
    def test_it_may_be_in_a_lifted_module(self, block):
        model = Lifted(block, functools.partial(nn.Dense, use_bias=False), block)
        expected = _run(model, variables := _variables(model))[1]
        with dn.intercept(_POLICY) as report:
            actual = _run(model, variables)[1]
            again = _cached(model), _cached(model)
        self.assertEqual(_changed(actual, expected), {"second/dense"})
        self.assertEqual(_paths(report), ["second/dense"])
        # Flax keeps what `nn.jit` traced the first time.
        steps = 3 if block is _LIFTED["scan"] else 1
        self.assertEqual(again, (steps * _BYTES, steps * _BYTES))

    def test_blocks_of_one_trace_have_one_decision(self):
        alike = nn.jit(Block)  # keeps one trace for both
        model = Lifted(alike, first=alike)
        with dn.intercept(_POLICY):
            self.assertEqual(_cached(model), 0)
        with dn.intercept(_POLICY, skip_first=False):
            self.assertEqual(_cached(model), 2 * _BYTES)

    def test_other_methods_have_a_first_layer_of_their_own(self):
        bound = Setup().bind(_variables(Setup()))
        with dn.intercept(_POLICY) as report:
            self.assertEqual(_cached(Setup(), method="decode"), _BYTES)
            self.assertIn("between_0", _paths(report))  # in `__call__`, for the shapes
        with dn.intercept(_POLICY) as report:
            bound.decode(_X)
            bound.decode(_X)
        self.assertEqual(_paths(report), ["between_1"])

    @parameterized.parameters(
        lambda f, model, v, x: model.apply(v, x, method=f),
        lambda f, model, v, x: nn.apply(f, model)(v, x),
        lambda f, model, v, x: f(model.bind(v), x),
    )
    def test_the_method_may_be_a_function(self, apply):
        def decode_after_first(model, x):
            return model.last(nn.tanh(model.decode(nn.tanh(model.first(x)))))

        with dn.intercept(_POLICY) as report:
            gradient = jax.grad(
                lambda v: apply(decode_after_first, Setup(), v, _X).sum()
            )
            cached = memory.cached_bytes(gradient, _variables(Setup()))
        self.assertEqual(_paths(report), ["between_0", "between_1", "last"])
        self.assertEqual(cached, report.bytes_after)
        self.assertEqual(cached, 3 * _BYTES)

    def test_it_need_not_be_skipped(self):
        with dn.intercept(_POLICY, skip_first=False) as report:
            self.assertEqual(_cached(Compact()), 3 * _BYTES)
        self.assertEqual(_paths(report), ["first", "second", "third"])

    def test_a_model_may_be_one_layer(self):
        with dn.intercept(_POLICY) as report:
            self.assertEqual(_cached(nn.Dense(4)), 0)
        self.assertEmpty(report.layers)
        with dn.intercept(_POLICY, skip_first=False) as report:
            self.assertEqual(_cached(nn.Dense(4)), _BYTES)
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
        with dn.intercept(_POLICY, **arguments) as report:
            self.assertEqual(_cached(Compact()), len(expected) * _BYTES)
        self.assertEqual(_paths(report), expected)

    def test_a_star_matches_slashes(self):
        with dn.intercept(_POLICY, only="*nd*") as report:
            _shapes(Lifted(Block))
        self.assertEqual(_paths(report), ["second/dense"])

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
            dn.intercept(_POLICY, **arguments),
        ):
            _shapes(Compact())

    def test_what_one_call_skips_another_may_use(self):
        variables = _variables(Setup())
        with dn.intercept(_POLICY, only="between_0") as report:
            Setup().apply(variables, _X)
            Setup().apply(variables, _X, method="decode")
        self.assertEqual(_paths(report), ["between_0"])

    def test_nothing_is_refused_where_no_layer_was_traced(self):
        with dn.intercept(_POLICY, only="no such layer") as report:
            pass
        self.assertEqual((report.bytes_before, report.bytes_after), (0, 0))
        self.assertRegex(str(report), r"^layer .*\n0 layers, bytes +0 +0$")

    @parameterized.parameters(
        (0.5, {}, TypeError, "DropIT policy, got 0.5"),
        (None, {}, TypeError, "DropIT policy, got None"),
        (_POLICY, {"only": ["second", 3]}, TypeError, "only takes a glob .*3"),
        (_POLICY, {"exclude": [None]}, TypeError, "exclude takes a glob .*None"),
        (_POLICY, {"exclude": 3}, TypeError, "exclude takes a glob .*3"),
        (_POLICY, {"only": []}, ValueError, r"only=\[\] matches no layer"),
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
        x = _ATTENTION(num_heads=2, name="mix")(x)
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
        with dn.intercept(_POLICY) as report:
            cached = _cached(Reported(), _input(2, 4, 32))
        self.assertEqual(str(report), _TABLE)
        self.assertEqual((report.bytes_before, report.bytes_after), (4608, 2464))
        self.assertEqual(cached, 2464)
        expected = dn.InterceptedLayer(
            *("mix/key", "DenseGeneral", (2, 4, 32), jnp.dtype("float32"), 1024, 544)
        )
        self.assertEqual(report.layers[1], expected)

    def test_of_a_loop_it_counts_one_step(self):
        with dn.intercept(_POLICY) as report:
            cached = _cached(Lifted(_LIFTED["scan"]))
        self.assertEqual((report.bytes_before, report.bytes_after), (384, _BYTES))
        self.assertEqual(cached, 3 * _BYTES)


class CompiledTest(parameterized.TestCase):
    def test_functions_are_traced_again_on_the_other_side(self):
        variables = _variables(Compact())
        gradient, since_inside = (
            jax.jit(_gradient(Compact())),
            jax.jit(_gradient(Compact())),
        )
        expected = gradient(variables)["params"]
        with dn.intercept(_POLICY):
            actual = gradient(variables)["params"]
            chex.assert_trees_all_equal(since_inside(variables)["params"], actual)
        # A mean over outputs has cotangents alike, so that whole kernels differ.
        for name, same in (("first", True), ("second", False), ("third", False)):
            kernels = actual[name]["kernel"], expected[name]["kernel"]
            self.assertEqual(bool(jnp.all(kernels[0] == kernels[1])), same)
        for function in (gradient, since_inside):
            chex.assert_trees_all_equal(function(variables)["params"], expected)

    def test_contexts_share_traces_where_they_mean_the_same(self):
        traces, variables = [], _shapes(Compact())

        @jax.jit
        def gradient(variables):
            traces.append(None)
            return _gradient(Compact())(variables)

        for arguments, cached, count in (
            (None, 0, 1),
            ((_POLICY,), 2 * _BYTES, 2),
            ((DropIT(0.5),), 2 * _BYTES, 2),
            ((_OTHER,), 2 * _OTHER_BYTES, 3),
            ((_POLICY, True, "second"), _BYTES, 4),
            ((_POLICY, True, ["second"]), _BYTES, 4),
            ((_POLICY, True, None, "second"), _BYTES, 5),
            ((_POLICY, False), 3 * _BYTES, 6),
            (None, 0, 6),
        ):
            if arguments is None:
                actual = memory.cached_bytes(gradient, variables)
            else:
                with dn.intercept(*arguments):
                    actual = memory.cached_bytes(gradient, variables)
            self.assertEqual((actual, len(traces)), (cached, count))


class NestedTest(parameterized.TestCase):
    @parameterized.parameters({"only": "third"}, {"exclude": "second"})
    def test_the_inner_decides_where_it_selects(self, **arguments):
        variables = _variables(Compact())
        with dn.intercept(_OTHER) as outer:
            with dn.intercept(_POLICY, **arguments) as inner:
                self.assertEqual(_cached(Compact()), _BYTES + _OTHER_BYTES)
                actual = _run(Compact(), variables)[1]
            self.assertEqual((_paths(outer), _paths(inner)), (["second"], ["third"]))
            # And the outer goes on.
            self.assertEqual(_cached(Compact()), 2 * _OTHER_BYTES)
            by_outer = _run(Compact(), variables)[1]
        self.assertEqual(_changed(actual, by_outer), {"third"})

    def test_a_glob_of_the_outer_may_be_for_layers_that_the_inner_takes(self):
        with (
            dn.intercept(_OTHER, only="third") as outer,
            dn.intercept(_POLICY) as inner,
        ):
            self.assertEqual(_cached(Compact()), 2 * _BYTES)
        self.assertEmpty(outer.layers)
        self.assertEqual(_paths(inner), ["second", "third"])

    @parameterized.parameters(
        functools.partial(dn.Dense, 8),
        functools.partial(dn.Einsum, (16, 8), "bc,cd->bd"),
    )
    def test_a_layers_own_policy_comes_first(self, layer):
        with dn.intercept(_POLICY) as report:
            own = OneLayer(functools.partial(layer, dropit=_OTHER))
            self.assertEqual(_cached(own), _OTHER_BYTES)
            self.assertEmpty(report.layers)
            # A layer without one is like Flax's.
            self.assertEqual(_cached(OneLayer(layer)), _BYTES)
        self.assertEqual(_paths(report), ["layer"])

    def test_so_does_the_policy_of_attention(self):
        x, attention = _input(3, 2, 16), dn.MultiHeadDotProductAttention
        model = OneLayer(functools.partial(attention, 2, dropit=_OTHER))
        with dn.intercept(_POLICY) as report:
            self.assertEqual(_cached(model, x), 4 * _OTHER_BYTES)
        self.assertEmpty(report.layers)

    def test_exceptions_leave_nothing_behind(self):
        bound = Setup().bind(_variables(Setup()))
        with (
            pytest.raises(flax.errors.ScopeParamShapeError),
            # That the glob matches nothing must not hide the error.
            dn.intercept(_POLICY, skip_first=False, only=["first", "none"]),
        ):
            bound(_input(6, 17))
        self.assertIsNone(bound.first.dot_general)
        self.assertIs(bound.first.promote_dtype, nn.dtypes.promote_dtype)
        self.assertEqual(_cached(Setup()), 0)
        with dn.intercept(_POLICY) as report:
            self.assertEqual(_cached(Setup()), 3 * _BYTES)
        self.assertNotIn("first", _paths(report))


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(16, name="first")(x))
        x = nn.Dropout(0.5, deterministic=not self.has_rng("dropout"))(x)
        x = _ATTENTION(num_heads=2, name="mix")(x)
        return nn.Einsum((16, 16), "btc,cd->btd", name="einsum")(x)


class RandomTest(parameterized.TestCase):
    def test_keys_decide(self):
        model, x, key = Noisy(), _input(2, 4, 16), jax.random.key
        variables = _variables(model, x)
        rngs = [{"dropout": key(0), "dropit": key(seed)} for seed in (0, 1, 0)]
        expected = _run(model, variables, x, rngs=rngs[0])
        with dn.intercept(_RANDOM) as report:
            run = _runner(model)
            one, other, same = (run(variables, x, each) for each in rngs)
        for out, _, of_x in (one, other):  # dropout is as without
            reference.assert_same_bits(out, expected[0])
            reference.assert_same_bits(of_x, expected[2])
        chex.assert_trees_all_equal(same, one)
        self.assertLen(report.layers, 5)
        self.assertEqual(_changed(one[1], expected[1]), set(_paths(report)))
        self.assertEqual(_changed(other[1], one[1]), set(_paths(report)))

    def test_a_missing_key_is_told_with_the_policy(self):
        with dn.intercept(_RANDOM):
            _shapes(Compact())  # no gradient, no key
            with pytest.raises(
                ValueError, match=r"strategy='random'.*rngs=\{'dropit': key\}"
            ):
                _cached(Compact())

    def test_without_a_gradient_the_input_need_not_suit_the_policy(self):
        # Means of a channel take several positions, which there are not.
        with dn.intercept(DropIT(0.5, fill="mean")):
            _shapes(Compact())
            with pytest.raises(ValueError, match="fill='mean'"):
                _cached(Compact())


class Replaced(nn.Dense):
    """A layer of its own, though its parameters are those of Dense."""

    @nn.compact
    def __call__(self, inputs):
        kernel = self.param("kernel", self.kernel_init, (16, self.features))
        return jnp.sin(inputs @ kernel)


class Extended(nn.Dense):
    @nn.compact
    def __call__(self, inputs):
        return jnp.sin(super().__call__(2 * inputs))


class UsersLayersTest(parameterized.TestCase):
    def test_products_with_a_state_are_left_alone(self):
        fp8 = {"dot_general_cls": nn.Fp8DirectDotGeneralOp}
        model = OneLayer(functools.partial(nn.Dense, 16, **fp8))
        with dn.intercept(_POLICY) as report:
            jax.eval_shape(model.init, jax.random.key(0), _X)
        self.assertEmpty(report.layers)
        layer = dn.Dense(16, dropit=_POLICY, **fp8)
        with pytest.raises(TypeError, match=r"dot_general_cls=.*Fp8DirectDotGeneralOp"):
            layer.init(jax.random.key(0), _X)

    def test_a_call_of_its_own_is_left_alone_until_it_calls_flaxs(self):
        with dn.intercept(_POLICY) as report:
            self.assertEqual(_cached(OneLayer(functools.partial(Replaced, 8))), 0)
            self.assertEmpty(report.layers)
            self.assertEqual(_cached(OneLayer(functools.partial(Extended, 8))), _BYTES)
        self.assertEqual([layer.kind for layer in report.layers], ["Extended"])

    @parameterized.parameters("dot_general", "dot_general_cls")
    def test_a_product_of_its_own_is_kept(self, hook):
        def halved(*args, **kwargs):
            return 0.5 * lax.dot_general(*args, **kwargs)

        mine = {hook: halved if hook == "dot_general" else lambda: halved}
        model = OneLayer(functools.partial(nn.Dense, 8, **mine))
        plain = OneLayer(functools.partial(nn.Dense, 8))
        expected = _run(model, variables := _variables(model))
        with dn.intercept(_POLICY) as report:
            out, gradients, of_x = _run(model, variables)
            of_plain = _run(plain, variables)[1]
        self.assertEqual(_paths(report), ["layer"])
        reference.assert_same_bits(out, expected[0])
        reference.assert_same_bits(of_x, expected[2])
        kernels = (run["layer/kernel"] for run in (gradients, of_plain))
        reference.assert_same_bits(next(kernels), 0.5 * next(kernels))


if __name__ == "__main__":
    absltest.main()
