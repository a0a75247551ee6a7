import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from dropit_jax import DropIT
from tests.dropit_jax import reference
from train import models
from train.models import layers
from train.models.positions import sincos_2d
from train.models.vit import ViT

_X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 12, 3)), jnp.float32)


def _vit(**fields):
    sizes = {"patch_size": 4, "width": 16, "num_layers": 1, "num_heads": 2}
    return ViT(10, **(sizes | fields))


def _variables(model, shape=_X.shape):
    return jax.eval_shape(
        lambda x: model.init(jax.random.key(0), x, False), jnp.zeros(shape)
    )


def _count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _random(model):
    """Parameters none of which is 0, as the head's are at first."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, leaf.dtype),
        _variables(model),
    )


def _evaluate(model, variables):
    return jax.jit(lambda v: model.apply(v, _X, False))(variables)


@functools.cache
def _run(model):
    """Variables, logits, and what the modules give."""

    @jax.jit
    def run(variables):
        return model.apply(variables, _X, False, capture_intermediates=True)

    variables = _random(model)
    logits, state = run(variables)
    return variables, logits, state["intermediates"]


class ArchitectureTest(parameterized.TestCase):
    @parameterized.parameters(
        # To the last one as in Google's implementation: ViT-L/16, B/16 and S/16, and
        # Touvron et al.'s DeiT-Ti, for 1000 classes.
        ("vit_l", 304_326_632),
        ("vit_b", 86_567_656),
        ("vit_s", 22_050_664),
        ("vit_ti", 5_717_416),
    )
    def test_has_the_published_number_of_parameters(self, name, count):
        model = models.create(name, 1000, patch_size=16)
        shape = (1, 224, 224, 3)
        self.assertEqual(_count(_variables(model, shape)["params"]), count)
        scanned = model.clone(scan=True)
        self.assertEqual(_count(_variables(scanned, shape)["params"]), count)

    def test_the_test_size_is_big_visions(self):
        params = _variables(models.create("vit_mu", 10), (1, 16, 16, 3))
        encoder = params["params"]["Transformer"]
        self.assertEqual([n for n in encoder if "block" in n], ["encoderblock_0"])
        block = encoder["encoderblock_0"]
        self.assertEqual(block["MlpBlock_3"]["Dense_0"]["kernel"].shape, (32, 128))
        query = block["MultiHeadDotProductAttention_1"]["query"]
        self.assertEqual(query["kernel"].shape, (32, 2, 16))

    def test_parameters_have_the_names_of_googles_checkpoints(self):
        params = _variables(_vit(num_layers=2))["params"]
        self.assertEqual(set(params), {"cls", "embedding", "head", "Transformer"})
        encoder = params["Transformer"]
        self.assertIn("pos_embedding", encoder["posembed_input"])
        self.assertIn("scale", encoder["encoder_norm"])
        block = encoder["encoderblock_1"]
        self.assertEqual(
            set(block),
            {
                "LayerNorm_0",
                "MultiHeadDotProductAttention_1",
                "LayerNorm_2",
                "MlpBlock_3",
            },
        )
        self.assertEqual(
            jax.tree.map(jnp.shape, block["MultiHeadDotProductAttention_1"]["out"]),
            {"kernel": (2, 8, 16), "bias": (16,)},
        )
        self.assertEqual(set(block["MlpBlock_3"]), {"Dense_0", "Dense_1"})

    def test_options_add_no_parameters(self):
        plain = _variables(_vit())["params"]
        random = _variables(_vit(dropout=0.1, drop_path=0.1))["params"]
        chex.assert_trees_all_equal_shapes_and_dtypes(random, plain)
        fixed = _variables(_vit(positions="sincos"))["params"]
        del plain["Transformer"]["posembed_input"]
        chex.assert_trees_all_equal_shapes_and_dtypes(fixed, plain)
        mean = _variables(_vit(positions="sincos", pool="gap"))["params"]
        del plain["cls"]
        chex.assert_trees_all_equal_shapes_and_dtypes(mean, plain)

    def test_its_tokens_are_the_patches(self):
        # The embedding by hand, with one layer's worth of nothing else.
        variables, _, captured = _run(_vit())
        tokens = captured["Transformer"]["posembed_input"]["__call__"][0]
        embedding = variables["params"]["embedding"]
        patches = _X.reshape(2, 2, 4, 3, 4, 3).transpose(0, 1, 3, 2, 4, 5)
        expected = patches.reshape(2, 6, 48) @ embedding["kernel"].reshape(48, 16)
        position = variables["params"]["Transformer"]["posembed_input"]["pos_embedding"]
        np.testing.assert_allclose(
            tokens[:, 1:],
            expected + embedding["bias"] + position[:, 1:],
            rtol=1e-4,
            atol=1e-5,
        )


class PoolTest(parameterized.TestCase):
    @parameterized.parameters(
        ("cls", 7, lambda tokens: tokens[:, 0]),
        ("gap", 6, lambda tokens: tokens.mean(axis=1)),
    )
    def test_the_head_reads(self, pool, length, read):
        fields = {"positions": "sincos"} if pool == "gap" else {}
        variables, logits, captured = _run(_vit(pool=pool, **fields))
        tokens = captured["Transformer"]["__call__"][0]
        self.assertEqual(tokens.shape, (2, length, 16))
        head = variables["params"]["head"]
        np.testing.assert_allclose(
            logits,
            read(np.asarray(tokens, np.float64)) @ head["kernel"] + head["bias"],
            rtol=1e-4,
            atol=1e-5,
        )


class PositionsTest(parameterized.TestCase):
    @parameterized.parameters((2, 3, 16), (3, 2, 8), (1, 1, 4))
    def test_sines_and_cosines(self, height, width, features):
        # In words of its own: a loop over places and frequencies.
        quarter = features // 4
        expected = np.zeros((height * width, features))
        for row in range(height):
            for column in range(width):
                for i in range(quarter):
                    period = 10_000 ** (i / (quarter - 1)) if quarter > 1 else 1.0
                    waves = (
                        *(math.sin(column / period), math.cos(column / period)),
                        *(math.sin(row / period), math.cos(row / period)),
                    )
                    for part, value in enumerate(waves):
                        expected[row * width + column, part * quarter + i] = value
        np.testing.assert_allclose(
            sincos_2d(height, width, features), expected, rtol=1e-12, atol=1e-12
        )

    @parameterized.parameters(("cls", 1), ("gap", 0))
    def test_are_added_to_the_patches(self, pool, before):
        variables, _, captured = _run(_vit(positions="sincos", pool=pool))
        patches = np.asarray(captured["embedding"]["__call__"][0]).reshape(2, 6, 16)
        tokens = captured["Transformer"]["posembed_input"]["__call__"][0]
        expected = patches + sincos_2d(2, 3, 16)
        np.testing.assert_allclose(tokens[:, before:], expected, rtol=1e-5, atol=1e-5)
        if pool == "cls":
            token = np.broadcast_to(variables["params"]["cls"][0], (2, 16))
            np.testing.assert_array_equal(tokens[:, 0], token)


class DtypeTest(parameterized.TestCase):
    @parameterized.product(scan=(False, True), pool=("cls", "gap"))
    def test_the_computation_alone_is_of_that_dtype(self, scan, pool):
        fields = {"positions": "sincos", "dropout": 0.1, "drop_path": 0.1}
        fields |= {"scan": scan, "pool": pool, "dtype": jnp.bfloat16}
        model = _vit(**fields)
        variables = _variables(model)
        for leaf in jax.tree.leaves(variables):
            self.assertEqual(leaf.dtype, jnp.float32)
        logits, state = jax.eval_shape(
            lambda v: model.apply(
                v,
                _X,
                True,
                rngs={"dropout": jax.random.key(0)},
                capture_intermediates=True,
            ),
            variables,
        )
        self.assertEqual(logits.dtype, jnp.float32)
        encoder = state["intermediates"]["Transformer"]
        for leaf in jax.tree.leaves(encoder):
            self.assertEqual(leaf.dtype, jnp.bfloat16)

    def test_it_rounds_and_no_more(self):
        variables, expected, _ = _run(_vit())
        actual = _evaluate(_vit(dtype=jnp.bfloat16), variables)
        error = jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected)
        self.assertBetween(float(error), 1e-5, 0.05)


class LayersTest(parameterized.TestCase):
    @parameterized.parameters(
        {"remat": "dots"},
        {"scan": True, "pool": "gap", "dtype": jnp.bfloat16, "remat": "blocks"},
    )
    def test_of_dropit_change_neither_parameters_nor_output(self, remat, **fields):
        plain = _vit(**fields)
        other = plain.clone(layers=layers.dropit(DropIT(0.75)), remat=remat)
        variables = _random(plain)
        chex.assert_trees_all_equal_shapes_and_dtypes(variables, _variables(other))
        reference.assert_same_bits(
            _evaluate(plain, variables), _evaluate(other, variables)
        )


class ErrorsTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"pool": "max"}, "ViT.pool: unknown value 'max'; known are 'cls', 'gap'"),
        ({"positions": "rope"}, "ViT.positions: unknown value 'rope'; .* 'sincos'"),
        ({"patch_size": 5}, "ViT.patch_size: 5 does not divide the image size, 8x12"),
        ({"patch_size": 8}, "ViT.patch_size: 8 does not divide the image size, 8x12"),
        ({"positions": "sincos", "width": 18}, "ViT.width: .* multiple of 4 .* 18"),
        ({"dropout": 1.0}, "ViT.dropout: must be in .0, 1., got 1.0"),
        ({"drop_path": -0.1}, "ViT.drop_path: must be in .0, 1., got -0.1"),
    )
    def test_are_clear(self, fields, message):
        with pytest.raises(ValueError, match=message):
            _variables(_vit(**fields))

    def test_of_the_sines(self):
        with pytest.raises(ValueError, match="multiple of 4, got 6"):
            sincos_2d(2, 2, 6)


if __name__ == "__main__":
    absltest.main()
