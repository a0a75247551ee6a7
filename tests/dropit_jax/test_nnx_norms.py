"""Norms, dropout and attention of `flax.nnx`, and whole models by presets."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import nnx

import dropit_jax
from dropit_jax import DropIT, LayerPreset
from dropit_jax import nnx as dn
from tests.dropit_jax import nnx_runs as runs
from tests.dropit_jax import reference

_INITS = {name: nnx.initializers.uniform(2.0) for name in ("scale_init", "bias_init")}
_PLAIN = {"use_scale": False, "use_bias": False}
_SLOW = {"use_fast_variance": False}
_HALF = {"dtype": jnp.bfloat16}


def _to_half(arrays, dtype=None):
    return [None if a is None else a.astype(jnp.bfloat16) for a in arrays]


# (layer, its arguments, its options, input shape, shape of a mask): options that do not
# meet in the code of a layer share a case.
_CASES = (
    ("BatchNorm", (16,), _INITS, (6, 3, 16), None),
    ("BatchNorm", (5,), _INITS | _HALF | {"axis": 1}, (4, 5, 8), None),
    ("BatchNorm", (16,), _PLAIN | _SLOW, (6, 3, 16), (6, 3, 1)),
    ("BatchNorm", (16,), _INITS | {"use_running_average": True}, (6, 16), None),
    ("LayerNorm", (24,), _INITS, (3, 5, 24), None),
    ("LayerNorm", (24,), _PLAIN | _HALF, (3, 5, 24), (3, 5, 24)),
    ("LayerNorm", (24,), _INITS | {"promote_dtype": _to_half}, (3, 24), None),
    (
        "LayerNorm",
        (12,),
        _INITS | _SLOW | {"reduction_axes": (1, 2), "feature_axes": (1, 2)},
        (3, 2, 6),
        None,
    ),
    ("RMSNorm", (24,), {"scale_init": _INITS["scale_init"]}, (3, 5, 24), None),
    ("RMSNorm", (24,), {"use_scale": False} | _HALF, (3, 24), (24,)),
    ("GroupNorm", (16, 4), _INITS, (2, 3, 3, 16), None),
    ("GroupNorm", (16, None, 2), _PLAIN, (2, 9, 16), (2, 9, 16)),
    ("InstanceNorm", (6,), _INITS, (2, 4, 4, 6), None),
)


def _layers(kind, arguments, options):
    """Flax's, and ours."""
    return [
        getattr(m, kind)(*arguments, **options, rngs=nnx.Rngs(0)) for m in (nnx, dn)
    ]


def _assert_near_as_a_whole(actual, expected):
    for a, e in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        error = np.asarray(a, np.float64) - np.asarray(e, np.float64)
        assert np.linalg.norm(error) <= 0.015 * np.linalg.norm(np.asarray(e))


class NormTest(parameterized.TestCase):
    @parameterized.parameters(*_CASES)
    def test_is_flaxs_layer_but_for_near_gradients(
        self, kind, arguments, options, shape, mask
    ):
        x = runs.numbers(*shape)
        given = {}
        if mask is not None:
            given["mask"] = jnp.asarray(np.random.default_rng(1).random(mask) < 0.8)
        theirs, ours = _layers(kind, arguments, options)
        chex.assert_trees_all_equal(nnx.state(ours), nnx.state(theirs))
        (actual,), (expected,) = (
            runs.run([layer], x, **given) for layer in (ours, theirs)
        )
        reference.assert_same_bits(actual[0], expected[0])
        chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
        if "bias" in expected[1]:
            bias = actual[1]["bias"], expected[1]["bias"]
            rounding = 0.01 if actual[0].dtype == jnp.bfloat16 else 1e-5
            np.testing.assert_allclose(*bias, rtol=rounding, atol=rounding)
        _assert_near_as_a_whole(actual, expected)
        if options.get("use_running_average"):
            chex.assert_trees_all_close(actual[2], expected[2], rtol=1e-6)

    def test_running_averages_are_flaxs(self):
        x = runs.numbers(6, 3, 16)
        layers = _layers("BatchNorm", (16,), {"momentum": 0.9})
        call = nnx.jit(lambda layer, x: layer(x))
        for layer in layers:
            call(layer, x)
            call(layer, 2 * x)
            layer.eval()
        theirs, ours = layers
        jax.tree.map(reference.assert_same_bits, nnx.state(ours), nnx.state(theirs))
        reference.assert_same_bits(call(ours, x), call(theirs, x))

    def test_groups_that_flax_mixes_up_are_left_to_it(self):
        x = runs.numbers(2, 4, 16)
        layers = _layers("GroupNorm", (16, 4), {"reduction_axes": (-1,)})
        chex.assert_trees_all_equal(*(runs.run([layer], x) for layer in layers))

    @parameterized.parameters(
        (("LayerNorm", (24,)), (3, 5, 24), 15), (("GroupNorm", (24, 4)), (3, 5, 24), 12)
    )
    def test_bytes_are_as_claimed(self, layer, shape, statistics):
        _, ours = _layers(*layer, {"use_scale": False})
        pullback = jax.eval_shape(
            lambda x: jax.vjp(ours, x)[1], jax.ShapeDtypeStruct(shape, jnp.float32)
        )
        cached = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(pullback))
        groups = len(reference.chunks(shape, 64))
        self.assertEqual(cached, np.prod(shape) + 4 * groups + 4 * statistics)

    @parameterized.parameters(
        ("int32", (2, 16), "", {}),
        ("float32", (2, 17), "shapes", {}),
        ("float32", (2, 16), "use_running_average", {"use_running_average": None}),
    )
    def test_other_inputs_and_errors_are_flaxs(self, dtype, shape, message, options):
        x = jnp.ones(shape, dtype)
        layers = _layers("BatchNorm", (16,), options)
        if dtype == "int32":
            reference.assert_same_bits(*(layer(x) for layer in layers))
            return
        for layer in layers:
            with pytest.raises((TypeError, ValueError), match=message):
                layer(x)


class DropoutTest(parameterized.TestCase):
    @parameterized.parameters(
        (0.3, {}),
        (0.5, {"broadcast_dims": (1,), "rng_collection": "noise"}),
        (0.5, {"deterministic": True}),
        (0.0, {}),
        (1.0, {}),
    )
    def test_is_flaxs_layer(self, rate, options):
        x = runs.numbers(2, 5, 16)

        def run(cls):
            rngs = nnx.Rngs(dropout=3, noise=4)
            model = nnx.Sequential(*(cls(rate, **options, rngs=rngs) for _ in "ab"))
            return runs.run([model], x)

        jax.tree.map(reference.assert_same_bits, run(dn.Dropout), run(nnx.Dropout))

    def test_each_call_draws_anew(self):
        theirs, ours = (m.Dropout(0.5, rngs=nnx.Rngs(0)) for m in (nnx, dn))
        for _ in range(2):
            x = runs.numbers(4, 16)
            reference.assert_same_bits(ours(x), theirs(x))

    @parameterized.parameters(
        (lambda: jax.random.key(1),),
        (lambda: nnx.Rngs(1),),
        (lambda: nnx.Rngs(1).dropout,),
    )
    def test_keys_may_come_with_the_call(self, rngs):
        x = runs.numbers(4, 16)
        theirs, ours = (m.Dropout(0.5) for m in (nnx, dn))
        reference.assert_same_bits(ours(x, rngs=rngs()), theirs(x, rngs=rngs()))

    @parameterized.parameters(
        ({}, ValueError, "rngs"),
        ({"rngs": 3}, TypeError, "rngs must be"),
        ({"deterministic": None}, ValueError, "deterministic"),
    )
    def test_errors_are_flaxs(self, options, error, message):
        layer = dn.Dropout(0.5)
        if "deterministic" in options:
            layer.deterministic = None
        with pytest.raises(error, match=message):
            layer(jnp.ones(3), **options)


class Shifted(nnx.BatchNorm):
    def __call__(self, x):
        return super().__call__(x + 1) - 1


class Network(nnx.Module):
    def __init__(self, rngs):
        self.entry = nnx.LayerNorm(16, rngs=rngs)
        self.conv = nnx.Conv(16, 16, (3,), rngs=rngs)
        self.shifted = Shifted(16, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
        self.head = nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x):
        x = self.drop(self.shifted(self.conv(self.entry(x))))
        return self.head(x + self.attention(x))


_DENSE, _CONV = DropIT(0.0, value_dtype="int8"), DropIT(0.5)
_PRESET = LayerPreset("lean", _DENSE, _CONV, one_bit=True, eight_bit=True)
_PROJECTIONS = [f"attention/{name}" for name in ("query", "key", "value", "out")]
_CHANGES = {
    "entry": ("LayerNorm", "8 bits"),
    "conv": ("Conv", _CONV),
    "shifted": ("Shifted", "8 bits"),
    "drop": ("Dropout", "1 bit"),
    "attention": ("MultiHeadAttention", "recomputed"),
    **dict.fromkeys(_PROJECTIONS, ("LinearGeneral", _DENSE)),
    "head": ("Linear", _DENSE),
}


def _paths(changes):
    return [change.path for change in changes]


def _program(model, x):
    """What a model computes."""
    graph, state = nnx.split(model)
    return str(jax.make_jaxpr(lambda s: nnx.merge(graph, s)(x))(state))


class ApplyTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.model = Network(nnx.Rngs(0))
        self.x = runs.numbers(4, 6, 16)

    def test_a_preset_converts_every_layer_and_none_takes_it_back(self):
        classes = [type(node) for _, node in nnx.iter_graph(self.model)]
        (expected,) = runs.run([self.model], self.x)
        program = _program(self.model, self.x)
        done = dn.apply(self.model, _PRESET)
        self.assertEqual(
            done,
            [dn.Change(path, kind, None, to) for path, (kind, to) in _CHANGES.items()],
        )
        self.assertIsInstance(self.model.shifted, Shifted)
        self.assertIsInstance(self.model.shifted, dn.BatchNorm)
        attention_fn = self.model.attention.attention_fn
        self.assertIs(attention_fn.func, dropit_jax.nn.dot_product_attention)
        self.assertEqual(attention_fn.keywords, {"bits": 8})
        (actual,) = runs.run([self.model], self.x)
        reference.assert_same_bits(actual[0], expected[0])
        # Kernels are as far off as the policy of the convolution has it.
        for near, far in zip(
            *map(jax.tree.leaves, (actual[2], expected[2])), strict=True
        ):
            error = np.linalg.norm(np.asarray(near) - np.asarray(far))
            self.assertLess(error, 0.15 * np.linalg.norm(far))
        self.assertEqual(dn.apply(self.model, "lean"), [])  # each has its own

        undone = dn.apply(self.model, "baseline")
        self.assertEqual(
            undone,
            [
                dataclasses.replace(change, before=change.after, after=None)
                for change in done
            ],
        )
        for cls, (_, node) in zip(classes, nnx.iter_graph(self.model), strict=True):
            self.assertIsInstance(node, cls)
            self.assertNotIsInstance(node, (dn.BatchNorm, dn.LayerNorm, dn.Dropout))
        self.assertEqual(_program(self.model, self.x), program)

    @parameterized.parameters(
        (_PRESET, {"only": ["*ed", "drop"]}, ["shifted", "drop"]),
        (
            "lean",
            {"exclude": "attention*"},
            ["entry", "conv", "shifted", "drop", "head"],
        ),
        ("dropit", {"exclude": "attention/*"}, ["conv", "drop", "head"]),
        (LayerPreset("norms", eight_bit=True), {}, ["entry", "shifted", "attention"]),
        (LayerPreset("dense", _DENSE), {}, [*_PROJECTIONS, "head"]),
        (DropIT(0.5), {"exclude": "attention/*"}, ["conv", "head"]),
    )
    def test_what_is_meant(self, preset, options, expected):
        self.assertEqual(_paths(dn.apply(self.model, preset, **options)), expected)
        self.assertCountEqual(_paths(dn.apply(self.model, None)), expected)

    def test_the_first_layer_is_the_first_with_a_policy(self):
        changes = dn.apply(self.model, _PRESET, skip_first=lambda m: m(self.x))
        self.assertEqual(_paths(changes), [path for path in _CHANGES if path != "conv"])

    @parameterized.parameters(
        ("leen", {}, ValueError, "'lean'"),
        (
            dropit_jax.layer_preset("lean", remat="blocks"),
            {},
            ValueError,
            "remat='blocks'",
        ),
        (("lean",), {}, TypeError, "policy, a preset or None, got"),
        (
            LayerPreset("x", None, DropIT(0.5, "random"), eight_bit=True),
            {},
            ValueError,
            "keys",
        ),
        ("lean", {"only": ["head", "norm"]}, ValueError, "matches 'norm'"),
        (LayerPreset("x", _DENSE), {"only": "entry"}, ValueError, "matches 'entry'"),
    )
    def test_what_is_refused_changes_nothing(self, preset, options, error, message):
        with pytest.raises(error, match=message):
            dn.apply(self.model, preset, **options)
        self.assertEqual(dn.apply(self.model, None), [])
        self.assertIs(type(self.model.entry), nnx.LayerNorm)

    def test_what_is_the_users_own_stays(self):
        class Own(dn.LayerNorm):
            pass

        own = functools.partial(nnx.dot_product_attention)
        self.model.attention.attention_fn = own
        self.model.entry = Own(16, rngs=nnx.Rngs(0))
        for preset in (_PRESET, None):
            changed = _paths(dn.apply(self.model, preset))
            self.assertFalse({"entry", "attention"} & set(changed))
        self.assertIs(self.model.attention.attention_fn, own)
        self.assertIs(type(self.model.entry), Own)
        self.model.entry = dn.LayerNorm(16, rngs=nnx.Rngs(0))
        self.assertEqual(
            dn.apply(self.model, None),
            [dn.Change("entry", "LayerNorm", "8 bits", None)],
        )
        self.assertIs(type(self.model.entry), nnx.LayerNorm)

    def test_training(self):
        losses = []
        for preset in (None, "lean"):
            model = Network(nnx.Rngs(0))
            dn.apply(model, preset)
            loss = lambda model: jnp.mean((model(self.x) - 1) ** 2)  # noqa: E731
            losses.append(runs.train(model, loss, steps=6))
        np.testing.assert_allclose(*losses, rtol=0.05)
        self.assertLess(losses[1][-1], 0.9 * losses[1][0])


if __name__ == "__main__":
    absltest.main()
