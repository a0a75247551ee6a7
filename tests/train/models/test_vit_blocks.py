"""What is random in the blocks of a ViT, and the blocks in a loop of the program."""

import functools

import chex
import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import dropit_jax
from dropit_jax import DropIT
from train.models import layers
from train.models.drop_path import DropPath, linear_rates
from train.models.vit import ViT

_LAYERS = 2
_X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 3)), jnp.float32)
_RANDOM = {"dropout": 0.3, "drop_path": 0.5}
# DropIT layers with the gradients of Flax's, and with those of some elements.
_ALL = layers.dropit(DropIT(rate=0.0, value_dtype=None))
_SOME = layers.dropit(DropIT(rate=0.75, value_dtype=None))


def _vit(**fields):
    sizes = {"patch_size": 4, "width": 8, "num_layers": _LAYERS, "num_heads": 2}
    return ViT(5, **(sizes | fields))


def _params(model):
    """Parameters none of which is 0, as the head's are at first."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), _X, False))["params"]
    return jax.tree.map(
        lambda leaf: (rng.normal(size=leaf.shape) * 0.3).astype(leaf.dtype), shapes
    )


def _stacked(params):
    encoder = dict(params["Transformer"])
    names = sorted(name for name in encoder if name.startswith("encoderblock_"))
    blocks = [encoder.pop(name) for name in names]
    encoder["encoderblock"] = jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)
    return params | {"Transformer": encoder}


def _run(model, params, seed=0, preset=None):
    """Logits and gradients of a training step."""
    dropout, dropit = jax.random.split(jax.random.key(seed))
    rngs = {"dropout": dropout, "dropit": dropit}
    gradients, logits = _step(model, preset)(params, rngs)
    return logits, gradients


@functools.cache
def _step(model, preset):
    def loss_fn(params, rngs):
        logits = model.apply({"params": params}, _X, True, rngs=rngs)
        return jnp.sin(logits).sum(), logits

    loss_fn = loss_fn if preset is None else dropit_jax.drop(loss_fn, preset)
    return jax.jit(jax.grad(loss_fn, has_aux=True))


@functools.cache
def _baseline(seed=0):
    """Parameters, logits and gradients of the plain model that is random."""
    model = _vit(scan=True, **_RANDOM)
    params = _params(model)
    return params, *_run(model, params, seed)


def _distance(actual, expected):
    actual, expected = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        for tree in (actual, expected)
    )
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


class DropPathTest(parameterized.TestCase):
    def test_rates_grow_linearly(self):
        np.testing.assert_allclose(
            linear_rates(0.3, 4), [0.0, 0.1, 0.2, 0.3], rtol=1e-6
        )
        np.testing.assert_array_equal(linear_rates(0.3, 1), [0.0])

    def test_drops_whole_samples_and_keeps_the_expectation(self):
        rate, samples = 0.3, 4096
        x = np.random.default_rng(0).normal(size=(samples, 2, 3)).astype(np.float32)
        rngs = {"dropout": jax.random.key(0)}
        y = np.asarray(DropPath().apply({}, x, jnp.float32(rate), True, rngs=rngs))
        dropped = (y == 0).all(axis=(1, 2))
        np.testing.assert_allclose(y[~dropped], x[~dropped] / (1 - rate), rtol=1e-6)
        # Four standard deviations of a binomial.
        bound = 4 * np.sqrt(rate * (1 - rate) / samples)
        self.assertAlmostEqual(dropped.mean(), rate, delta=bound)
        self.assertAlmostEqual((y / x).mean(), 1, delta=bound / (1 - rate))

    def test_is_off(self):
        x = jnp.ones((4, 2))
        for rate, train in ((None, True), (jnp.float32(0.5), False)):
            np.testing.assert_array_equal(DropPath().apply({}, x, rate, train), x)

    @parameterized.parameters(False, True)
    def test_every_block_draws_for_itself_at_its_rate(self, scan):
        # Nothing but the MLP's last bias says anything: in block i it is the i-th unit
        # vector, so that this element of a sample's tokens is the scale of its branch.
        samples, blocks = 1024, 3
        model = _vit(num_layers=blocks, drop_path=0.5, pool="gap")
        model = model.clone(num_classes=model.width)
        params = jax.tree.map(np.zeros_like, _params(model))
        encoder = params["Transformer"]
        encoder["encoder_norm"]["scale"] += 1
        params["head"]["kernel"] += np.eye(model.width, dtype=np.float32)
        for i in range(blocks):
            mlp = encoder[f"encoderblock_{i}"]["MlpBlock_3"]
            mlp["Dense_1"]["bias"] = np.eye(model.width, dtype=np.float32)[i]
        params = _stacked(params) if scan else params
        logits = jax.jit(
            lambda p: model.clone(scan=scan).apply(
                {"params": p},
                np.zeros((samples, 8, 8, 3), np.float32),
                True,
                rngs={"dropout": jax.random.key(0)},
            )
        )(params)
        # Relative to the first, which is never dropped; the last is the norm's shift.
        logits = np.asarray(logits)
        scales = (logits - logits[:, -1:])[:, :blocks]
        scales = scales / scales[:, :1]
        for i, expected in enumerate((0.0, 0.25, 0.5)):
            dropped = np.abs(scales[:, i]) < 1e-3
            self.assertAlmostEqual(dropped.mean(), expected, delta=0.06, msg=i)
            np.testing.assert_allclose(
                scales[~dropped, i], 1 / (1 - expected), rtol=1e-3
            )
        both = (np.abs(scales[:, 1:]) < 1e-3).all(axis=1).mean()
        self.assertAlmostEqual(both, 0.25 * 0.5, delta=0.05)


class DropoutTest(parameterized.TestCase):
    def test_has_googles_places(self):
        model = _vit(num_layers=1, dropout=0.25, drop_path=0.1)
        params = _params(model)
        names, places = [], []

        def record(call, args, kwargs, context):
            out = call(*args, **kwargs)
            # Not the same call again, by the layer of Flax's that a layer derives from.
            again = names and names[-1] == context.module.name
            if context.method_name == "__call__" and not again:
                names.append(context.module.name)
                places.append((args[0], out))
            return out

        @jax.jit
        def recorded(params):
            with nn.intercept_methods(record):
                rngs = {"dropout": jax.random.key(0)}
                model.apply({"params": params}, _X, True, rngs=rngs)
            return places

        calls = [
            (name, *place) for name, place in zip(names, recorded(params), strict=True)
        ]
        names = [name for name in names if name not in ("query", "key", "value")]
        self.assertEqual(
            names,
            [
                *("embedding", "posembed_input", "Dropout_0", "LayerNorm_0", "out"),
                *("MultiHeadDotProductAttention_1", "Dropout_0", "DropPath_0"),
                *("LayerNorm_2", "Dense_0", "Dropout_0", "Dense_1", "Dropout_1"),
                *("MlpBlock_3", "DropPath_1", "encoderblock_0", "encoder_norm"),
                *("Transformer", "head", None),
            ],
        )
        hidden = next(out for name, _, out in calls if name == "Dense_0")
        _, after_gelu, _ = [call for call in calls if call[0] == "Dropout_0"][2]
        np.testing.assert_allclose(after_gelu, nn.gelu(hidden), rtol=1e-5, atol=1e-6)
        for name, x, out in calls:
            if name in ("Dropout_0", "Dropout_1"):
                kept = np.asarray(out) != 0
                self.assertAlmostEqual(1 - kept.mean(), 0.25, delta=0.1)
                np.testing.assert_allclose(
                    np.asarray(out)[kept], np.asarray(x)[kept] / 0.75, rtol=1e-6
                )

    @parameterized.parameters(False, True)
    def test_evaluation_and_a_rate_of_0_are_not_random(self, scan):
        params = _params(_vit(scan=scan))

        def program(model, train):
            call = jax.make_jaxpr(lambda p: model.apply({"params": p}, _X, train))
            return str(call(params))

        expected = program(_vit(scan=scan), False)
        self.assertNotIn("random_", expected)
        self.assertEqual(program(_vit(scan=scan), True), expected)
        random = _vit(scan=scan, **_RANDOM)
        if not scan:  # where the loop is given the rates, though nothing reads them
            self.assertEqual(program(random, False), expected)
        self.assertNotIn("random_", program(random, False))
        with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
            program(random, True)

    @parameterized.parameters({"dropout": 0.3}, {"drop_path": 0.5})
    def test_each_of_them_is_random_in_training(self, **fields):
        model = _vit(**fields)
        apply = jax.jit(lambda p, key: model.apply(p, _X, True, rngs={"dropout": key}))
        params = {"params": _params(model)}
        logits = [apply(params, jax.random.key(seed)) for seed in (0, 1)]
        self.assertGreater(_distance(*logits), 0.01)


class GradientTest(parameterized.TestCase):
    """Of what is random, against the plain model with the same key."""

    @parameterized.parameters({"remat": "dots"}, {"remat": "blocks", "layers": _ALL})
    def test_is_the_plain_models_where_nothing_is_dropped(self, **fields):
        params, same, expected = _baseline()
        logits, gradients = _run(_vit(scan=True, **fields, **_RANDOM), params)
        np.testing.assert_array_equal(logits, same)
        chex.assert_trees_all_close(gradients, expected, rtol=1e-5, atol=1e-5)

    def test_of_blocks_recomputed_from_8_bits_is_near(self):
        params, same, expected = _baseline()
        model = _vit(scan=True, remat="blocks", **_RANDOM)
        logits, gradients = _run(model, params, preset="lean")
        np.testing.assert_allclose(logits, same, rtol=1e-5, atol=1e-6)
        # With other masks than the forward pass's it would be off by more than itself.
        self.assertBetween(_distance(gradients, expected), 1e-5, 0.01)
        _, _, others = _baseline(seed=1)
        self.assertGreater(_distance(others, expected), 0.1)


class ScanTest(parameterized.TestCase):
    def test_is_the_loop(self):
        fields = {"pool": "gap", "positions": "sincos"}
        loop = _vit(remat="dots", layers=_SOME, **fields)
        params = _params(loop)
        logits, gradients = _run(loop, params)
        actual, in_scan = _run(loop.clone(scan=True), _stacked(params))
        np.testing.assert_allclose(actual, logits, rtol=1e-5, atol=1e-5)
        chex.assert_trees_all_close(in_scan, _stacked(gradients), rtol=1e-4, atol=1e-5)

    def test_its_blocks_start_differently(self):
        model = _vit(scan=True)

        @jax.jit
        def initial():  # of this alone, which compiles in less time
            params = model.init(jax.random.key(0), _X, False)["params"]
            return params["Transformer"]["encoderblock"]["MlpBlock_3"]["Dense_0"]

        kernel = np.asarray(initial()["kernel"])
        self.assertEqual(kernel.shape, (_LAYERS, 8, 32))
        self.assertGreater(np.abs(kernel[0] - kernel[1]).max(), 0.01)
        # As each would alone: Glorot and Bengio's bound, of one layer's sizes.
        bound = np.sqrt(6 / (8 + 32))
        self.assertBetween(np.abs(kernel).max(), 0.95 * bound, bound)

    def test_the_program_is_as_long_for_any_depth(self):
        def length(num_layers):
            fields = {"layers": _SOME, "remat": "blocks", "num_layers": num_layers}
            model = _vit(scan=True, **fields, **_RANDOM)
            params = jax.eval_shape(lambda: model.init(jax.random.key(0), _X, False))
            rngs = {"dropout": jax.random.key(0)}
            gradient = jax.grad(lambda v: model.apply(v, _X, True, rngs=rngs).sum())
            return len(str(jax.make_jaxpr(gradient)(params)).splitlines())

        self.assertEqual(length(2), length(5))

    def test_what_is_dropped_at_random_is_drawn_in_it(self):
        random = layers.dropit(DropIT(strategy="random"))
        model = _vit(layers=random, remat="blocks", scan=True)
        params = _params(model)
        (logits, first), (same, second) = _run(model, params), _run(model, params, 1)
        np.testing.assert_array_equal(logits, same)
        self.assertGreater(_distance(first, second), 0.01)

    def test_blocks_are_not_told_apart_by_layers(self):
        # A checkpoint of one kind is one of all.
        trees = [
            jax.eval_shape(lambda m=model: m.init(jax.random.key(0), _X, False))
            for model in (
                _vit(scan=True, layers=kind, remat=remat)
                for kind in (layers.FLAX, _SOME)
                for remat in ("none", "blocks")
            )
        ]
        for tree in trees[1:]:
            chex.assert_trees_all_equal_shapes_and_dtypes(tree, trees[0])


if __name__ == "__main__":
    absltest.main()
