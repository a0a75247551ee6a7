import functools
import io
import json
import math
import pickle
import tempfile
import tracemalloc
import warnings
import zipfile
from pathlib import Path
from unittest import mock

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from absl.testing import absltest, parameterized

from dropit_jax import layer_preset
from tests.train import vit_reference as reference
from train import models, weights
from train.models.resnet import ResNet
from train.models.vit import ViT
from train.weights.positions import resize

_CLASSES, _PATCH, _WIDTH, _LAYERS, _HEADS = 10, 4, 16, 2, 2
_SIZE = 16
_GRID = _SIZE // _PATCH
_POSITIONS = 1 + _GRID**2
_KERNEL = "MlpBlock_3/Dense_0/kernel"
_POS_EMBEDDING = "Transformer/posembed_input/pos_embedding"


def _vit(**fields):
    sizes = {
        "num_classes": _CLASSES,
        "patch_size": _PATCH,
        "width": _WIDTH,
        "num_layers": _LAYERS,
        "num_heads": _HEADS,
    }
    return ViT(**(sizes | fields))


def _resnet(**fields):
    return ResNet(
        **({"num_classes": _CLASSES, "stage_sizes": (1, 1), "width": 8} | fields)
    )


def _specs(model, size=_SIZE):
    """What `init` would make, as plain dicts, without making it."""
    return jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, size, size, 3)), False)
    )


def _random(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: (
            rng.normal(size=shape) * 0.3 + ("scale" in name or "norm" in name)
        ).astype(np.float32)
        for name, shape in shapes.items()
    }


def _random_variables(model, size=_SIZE, seed=0):
    specs = _flat(_specs(model, size))
    return _nested(_random({name: spec.shape for name, spec in specs.items()}, seed))


def _google(positions=_POSITIONS, classes=_CLASSES, **kwargs):
    return _random(
        reference.google_shapes(
            classes, _PATCH, _WIDTH, _LAYERS, _HEADS, positions, **kwargs
        )
    )


def _hugging_face(positions=_POSITIONS):
    return _random(
        reference.hugging_face_shapes(_CLASSES, _PATCH, _WIDTH, _LAYERS, positions)
    )


def _flat(variables):
    return flax.traverse_util.flatten_dict(variables, sep="/")


def _nested(arrays):
    return flax.traverse_util.unflatten_dict(arrays, sep="/")


def _images(size=_SIZE):
    shape = (3, size, size, 3)
    return np.random.default_rng(5).normal(size=shape).astype(np.float32)


def _logits(model, variables, images=None):
    images = _images() if images is None else images
    return np.asarray(jax.jit(lambda v, x: model.apply(v, x, False))(variables, images))


class _TestCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))

    def write(self, arrays, name="file.npz"):
        path = self.folder / name
        if path.suffix == ".npz":
            np.savez(path, **arrays)
        else:
            safetensors.numpy.save_file(arrays, path)
        return path

    def assert_equal(self, actual, expected):
        """Two trees of the same structure, dtypes and numbers."""
        self.assertEqual(jax.tree.structure(actual), jax.tree.structure(expected))
        same = functools.partial(np.testing.assert_array_equal, strict=True)
        jax.tree.map(same, actual, expected)

    def assert_like(self, variables, specs):
        self.assertEqual(jax.tree.structure(variables), jax.tree.structure(specs))
        for name, spec in _flat(specs).items():
            leaf = _flat(variables)[name]
            self.assertIsInstance(leaf, np.ndarray, name)
            self.assertEqual((leaf.shape, leaf.dtype), (spec.shape, spec.dtype), name)

    def message(self, path, variables):
        with pytest.raises(weights.WeightsError) as caught:
            weights.load(path, variables)
        return str(caught.value)


class ReferenceTest(_TestCase):
    def test_vit_b_16_has_the_size_that_is_published(self):
        # Of ViT-B/16 with 1000 classes, as PyTorch's documentation of vit_b_16 has it.
        for shapes in (
            reference.google_shapes(1000, 16, 768, 12, 12, 197),
            reference.hugging_face_shapes(1000, 16, 768, 12, 197),
        ):
            self.assertEqual(sum(map(math.prod, shapes.values())), 86_567_656)


class GoogleTest(_TestCase):
    def test_has_every_name_and_shape_of_vit_b_16(self):
        shapes = reference.google_shapes(1000, 16, 768, 12, 12, 197)
        zero = np.zeros((), np.float16)
        path = self.write({k: np.broadcast_to(zero, v) for k, v in shapes.items()})
        model = models.create("vit_b", 1000, layer_preset("baseline"), patch_size=16)
        # In the file's dtype, so that the weights are in memory once.
        specs = jax.tree.map(
            lambda spec: jax.ShapeDtypeStruct(spec.shape, zero.dtype),
            _specs(model, 224),
        )
        loaded = weights.load(path, specs)
        self.assert_like(loaded, specs)
        self.assertEqual(
            {f"params/{name}": shape for name, shape in shapes.items()},
            {name: leaf.shape for name, leaf in _flat(loaded).items()},
        )

    @parameterized.product(scan=[False, True])
    def test_logits_are_those_of_an_independent_forward_pass(self, scan):
        model, arrays = _vit(scan=scan), _google()
        specs = _specs(model)
        loaded = weights.load(self.write(arrays), specs)
        self.assert_like(loaded, specs)
        np.testing.assert_allclose(
            _logits(model, loaded),
            reference.google_logits(arrays, _images()),
            rtol=1e-4,
            atol=1e-5,
        )

    def test_class_token_is_left_out_for_a_model_that_has_none(self):
        model, arrays = _vit(pool="gap"), _google()
        loaded = weights.load(self.write(arrays), _specs(model))
        self.assertNotIn("cls", loaded["params"])
        arrays[_POS_EMBEDDING] = arrays[_POS_EMBEDDING][:, 1:]
        np.testing.assert_allclose(
            _logits(model, loaded),
            reference.google_logits(arrays, _images(), pool="gap"),
            rtol=1e-4,
            atol=1e-5,
        )

    def test_class_token_is_left_out_where_no_positions_are_learned(self):
        specs, arrays = _specs(_vit(pool="gap", positions="sincos")), _google()
        del arrays[_POS_EMBEDDING]
        loaded = weights.load(self.write(arrays), specs)
        self.assert_like(loaded, specs)
        np.testing.assert_array_equal(
            loaded["params"]["embedding"]["kernel"], arrays["embedding/kernel"]
        )

    def test_class_token_is_left_out_beside_an_interpolation(self):
        arrays = _google(1 + 36)
        loaded = weights.load(self.write(arrays), _specs(_vit(pool="gap")))
        grid = arrays[_POS_EMBEDDING][0, 1:].reshape(6, 6, _WIDTH)
        np.testing.assert_allclose(
            _flat(loaded["params"])[_POS_EMBEDDING][0],
            reference.interpolate(grid, _GRID).reshape(-1, _WIDTH),
            rtol=1e-5,
            atol=1e-6,
        )

    def test_head_that_reads_another_layer_is_left_out_with_it(self):
        variables = _random_variables(_vit(), seed=1)
        path = self.write(_google(pre_logits=True))
        loaded = weights.load(path, variables)
        for name in ("kernel", "bias"):
            self.assertIs(
                loaded["params"]["head"][name], variables["params"]["head"][name]
            )

    def test_layout_is_told_by_names_and_not_by_the_extension(self):
        arrays, specs = _google(), _specs(_vit())
        self.assert_equal(
            weights.load(self.write(arrays, "file.safetensors"), specs),
            weights.load(self.write(arrays, "file.npz"), specs),
        )


class HuggingFaceTest(_TestCase):
    @parameterized.parameters((False, 1), (False, 2), (False, 4), (True, 2))
    def test_logits_are_those_of_an_independent_forward_pass(self, scan, heads):
        model, arrays = _vit(scan=scan, num_heads=heads), _hugging_face()
        specs = _specs(model)
        loaded = weights.load(self.write(arrays, "file.safetensors"), specs)
        self.assert_like(loaded, specs)
        expected = reference.hugging_face_logits(
            arrays, _images(), heads, reference.gelu_tanh, 1e-6
        )
        np.testing.assert_allclose(
            _logits(model, loaded), expected, rtol=1e-4, atol=1e-5
        )

    def test_logits_are_nearly_those_with_its_own_gelu_and_epsilon(self):
        model, arrays = _vit(), _hugging_face()
        path = self.write(arrays, "file.safetensors")
        logits = _logits(model, weights.load(path, _specs(model)))
        expected = reference.hugging_face_logits(arrays, _images(), _HEADS)
        difference = np.abs(logits - expected).max()
        self.assertBetween(difference, 1e-4, 1e-2)

    def test_model_without_a_classifier_keeps_the_head(self):
        arrays = {
            name.removeprefix("vit."): array
            for name, array in _hugging_face().items()
            if not name.startswith("classifier.")
        }
        arrays["pooler.dense.weight"] = np.ones((_WIDTH, _WIDTH), np.float32)
        arrays["pooler.dense.bias"] = np.ones((_WIDTH,), np.float32)
        arrays["embeddings.mask_token"] = np.ones((1, 1, _WIDTH), np.float32)
        variables = _random_variables(_vit(), seed=1)
        loaded = weights.load(self.write(arrays, "file.safetensors"), variables)
        whole = weights.load(
            self.write(_hugging_face(), "whole.safetensors"), variables
        )
        for name in ("kernel", "bias"):
            kept = variables["params"]["head"][name]
            self.assertIs(loaded["params"]["head"][name], kept)
            whole["params"]["head"][name] = kept
        self.assert_equal(loaded, whole)

    def test_position_embeddings_are_interpolated(self):
        arrays = _hugging_face(1 + 9)
        path = self.write(arrays, "file.safetensors")
        loaded = weights.load(path, _specs(_vit()))
        old = arrays["vit.embeddings.position_embeddings"][0]
        new = _flat(loaded["params"])[_POS_EMBEDDING][0]
        np.testing.assert_array_equal(new[0], old[0])
        np.testing.assert_allclose(
            new[1:],
            reference.interpolate(old[1:].reshape(3, 3, _WIDTH), _GRID).reshape(
                -1, _WIDTH
            ),
            rtol=1e-5,
            atol=1e-6,
        )

    @parameterized.parameters(
        "decoder.weight",
        "vit.encoder.layer.0.attention.attention.query.lora",
        "vit.encoder.layer.0.crossattention.weight",
        "vit.embeddings.distillation_token",
    )
    def test_any_other_name_is_an_error_that_lists_it(self, name):
        arrays = _hugging_face() | {name: np.ones((2, 3), np.float32)}
        message = self.message(self.write(arrays, "file.safetensors"), _specs(_vit()))
        self.assertIn("1 arrays do not fit", message)
        self.assertIn(f"{name} (2, 3): in the file alone", message)

    def test_heads_that_do_not_fit_are_shown_as_they_are(self):
        message = self.message(
            self.write(_hugging_face(), "file.safetensors"),
            _specs(_vit(width=32)),
        )
        self.assertIn(
            "vit.encoder.layer.0.attention.attention.query.weight (params/Transformer/"
            "encoderblock_0/MultiHeadDotProductAttention_1/query/kernel): (16, 16) in "
            "the file, (32, 2, 16) in the model",
            message,
        )


class PositionsTest(_TestCase):
    @parameterized.product(
        # From 24 rows to 22, and from 8 to 26, SciPy's default has a last row of zeros.
        sizes=[(1, 3), (4, 1), (3, 5), (7, 4), (2, 9), (24, 22), (8, 26)],
        tokens=[0, 1],
    )
    def test_is_bilinear_and_leaves_tokens_alone(self, sizes, tokens):
        old, new = sizes
        rng = np.random.default_rng(0)
        embeddings = rng.normal(size=(1, tokens + old**2, 3))
        resized = resize(embeddings, tokens + new**2, tokens)
        np.testing.assert_array_equal(resized[:, :tokens], embeddings[:, :tokens])
        expected = reference.interpolate(
            embeddings[0, tokens:].reshape(old, old, 3), new
        )
        np.testing.assert_allclose(
            resized[0, tokens:], expected.reshape(-1, 3), atol=1e-12
        )

    @parameterized.parameters((1 + 12, 1 + 9), (1 + 9, 1 + 12), (1, 1 + 9), (1 + 9, 1))
    def test_grid_that_is_not_square_is_not_interpolated(self, old, new):
        with pytest.raises(ValueError, match="is no square"):
            resize(np.zeros((1, old, 3)), new, 1)

    @parameterized.parameters(36, 9)
    def test_is_applied_to_our_own_files_too(self, old):
        variables = _random_variables(_vit())
        rng = np.random.default_rng(2)
        old_positions = rng.normal(size=(1, 1 + old, _WIDTH)).astype(np.float32)
        arrays = _flat(variables) | {f"params/{_POS_EMBEDDING}": old_positions}
        loaded = weights.load(self.write(arrays, "file.safetensors"), _specs(_vit()))
        grid = old_positions[0, 1:].reshape(math.isqrt(old), -1, _WIDTH)
        np.testing.assert_allclose(
            _flat(loaded["params"])[_POS_EMBEDDING][0, 1:],
            reference.interpolate(grid, _GRID).reshape(-1, _WIDTH),
            rtol=1e-5,
            atol=1e-6,
        )

    def test_equally_many_positions_are_taken_as_they_are(self):
        arrays = _google(1 + 12)
        model = _vit()
        specs = jax.eval_shape(
            lambda: model.init(jax.random.key(0), jnp.zeros((1, 12, 16, 3)), False)
        )
        loaded = weights.load(self.write(arrays), specs)
        np.testing.assert_array_equal(
            _flat(loaded["params"])[_POS_EMBEDDING], arrays[_POS_EMBEDDING]
        )

    def test_error_says_that_grids_must_be_square(self):
        message = self.message(self.write(_google(1 + 12)), _specs(_vit()))
        self.assertIn(
            "(1, 13, 16) in the file, (1, 17, 16) in the model; only square grids",
            message,
        )

    @parameterized.parameters("cls", "gap")
    def test_model_that_computes_its_positions_takes_none(self, pool):
        specs = _specs(_vit(positions="sincos", pool=pool))
        message = self.message(self.write(_google()), specs)
        self.assertIn("1 arrays do not fit", message)
        self.assertIn(f"{_POS_EMBEDDING} (1, 17, 16): in the file alone", message)


class HeadTest(_TestCase):
    @parameterized.parameters("google", "hugging_face", "own")
    def test_head_of_other_classes_stays_as_it_is(self, layout):
        if layout == "google":
            path = self.write(_google())
        elif layout == "hugging_face":
            path = self.write(_hugging_face(), "file.safetensors")
        else:
            path = self.folder / "own.safetensors"
            weights.save(path, _random_variables(_vit()), {})
        variables = _random_variables(_vit(num_classes=3), seed=1)
        loaded = weights.load(path, variables)
        same = weights.load(path, _specs(_vit()))
        for name, leaf in _flat(loaded).items():
            if name.startswith("params/head/"):
                self.assertIs(leaf, _flat(variables)[name])
            else:
                np.testing.assert_array_equal(leaf, _flat(same)[name], name)
        self.assertEqual(same["params"]["head"]["kernel"].shape, (_WIDTH, _CLASSES))

    def test_shape_of_a_head_that_stays_may_be_abstract(self):
        specs = _specs(_vit(num_classes=3))
        loaded = weights.load(self.write(_google()), specs)
        head = specs["params"]["head"]
        self.assertIs(loaded["params"]["head"]["kernel"], head["kernel"])

    def test_half_a_head_is_an_error(self):
        arrays = _google()
        del arrays["head/bias"]
        message = self.message(self.write(arrays), _specs(_vit()))
        self.assertIn("1 arrays do not fit", message)
        self.assertIn("params/head/bias (10,): in the model alone", message)

    @parameterized.parameters(_CLASSES, 3)
    def test_head_of_another_width_is_an_error(self, classes):
        arrays = _google() | {"head/kernel": np.ones((7, _CLASSES), np.float32)}
        message = self.message(self.write(arrays), _specs(_vit(num_classes=classes)))
        self.assertIn(f"(7, 10) in the file, (16, {classes}) in the model", message)


class OwnTest(_TestCase):
    @parameterized.parameters(
        (_vit(),),
        (_vit(scan=True),),
        (_vit(pool="gap", positions="sincos"),),
        (_resnet(),),
        (_resnet(stem="imagenet"),),
    )
    def test_round_trip(self, model):
        variables = _random_variables(model)
        path = self.folder / "file.safetensors"
        weights.save(path, variables, {"step": "3"})
        loaded = weights.load(path, _specs(model))
        self.assert_equal(loaded, variables)
        plain = safetensors.numpy.load_file(path)
        self.assert_equal(flax.traverse_util.unflatten_dict(plain, sep="/"), variables)
        with safetensors.safe_open(path, "np") as file:
            self.assertEqual(file.metadata(), {"step": "3"})

    def test_resnet_has_statistics(self):
        self.assertIn("batch_stats", _random_variables(_resnet()))

    @parameterized.parameters((False, True), (True, False))
    def test_scanned_and_looped_blocks_take_each_others_file(self, saved, loaded):
        variables = _random_variables(_vit(scan=saved))
        path = self.folder / "file.safetensors"
        weights.save(path, variables, {})
        model = _vit(scan=loaded)
        other = weights.load(path, _specs(model))
        self.assert_like(other, _specs(model))
        np.testing.assert_allclose(
            _logits(model, other),
            _logits(_vit(scan=saved), variables),
            rtol=1e-5,
            atol=1e-5,
        )
        name = f"encoderblock_1/{_KERNEL}"
        stacked, apart = (variables, other) if saved else (other, variables)
        np.testing.assert_array_equal(
            _flat(apart["params"]["Transformer"])[name],
            _flat(stacked["params"]["Transformer"])[f"encoderblock/{_KERNEL}"][1],
        )

    def test_scanned_blocks_are_of_the_number_that_the_model_has(self):
        path = self.folder / "file.safetensors"
        weights.save(path, _random_variables(_vit(scan=True)), {})
        message = self.message(path, _specs(_vit(scan=True, num_layers=3)))
        self.assertIn("16 arrays do not fit", message)
        self.assertIn(f"params/Transformer/encoderblock_2/{_KERNEL}", message)

    @parameterized.parameters(jnp.bfloat16, np.float16, np.float64)
    def test_other_floating_types_become_the_variables(self, dtype):
        variables = _random_variables(_resnet())
        low = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)
        expected = jax.tree.map(lambda leaf: leaf.astype(np.float32), low)
        for name in ("file.safetensors", "file.npz"):
            path = self.write(_flat(low), name)
            loaded = weights.load(path, _specs(_resnet()))
            self.assert_like(loaded, _specs(_resnet()))
            self.assert_equal(loaded, expected)

    def test_bfloat16_is_saved_as_it_is(self):
        path = self.folder / "file.safetensors"
        saved = {"params": {"w": jnp.ones((2, 3), jnp.bfloat16)}}
        weights.save(path, saved, {})
        self.assertEqual(
            safetensors.numpy.load_file(path)["params/w"].dtype, jnp.bfloat16
        )
        self.assert_equal(weights.load(path, saved), saved)

    @parameterized.parameters(jnp.bfloat16, np.float16)
    def test_positions_of_low_precision_are_interpolated(self, dtype):
        arrays = {k: v.astype(dtype) for k, v in _google(1 + 9).items()}
        wide = {k: v.astype(np.float32) for k, v in arrays.items()}
        specs = _specs(_vit())
        self.assert_equal(
            weights.load(self.write(arrays), specs),
            weights.load(self.write(wide, "wide.npz"), specs),
        )

    def test_empty_collection_stays_and_is_not_written(self):
        variables = _random_variables(_vit()) | {"batch_stats": {}}
        path = self.folder / "file.safetensors"
        weights.save(path, variables, {})
        self.assert_equal(weights.load(path, variables), variables)
        self.assertNotIn("batch_stats", weights.load(path, _specs(_vit())))

    def test_what_is_saved_does_not_depend_on_its_layout_in_memory(self):
        kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
        scalar = np.asarray(2, np.float32)
        path = self.folder / "file.safetensors"
        weights.save(path, {"params": {"w": kernel.T, "s": scalar}}, {})
        plain = safetensors.numpy.load_file(path)
        np.testing.assert_array_equal(plain["params/w"], kernel.T)
        self.assertEqual(plain["params/s"].shape, ())

    def test_arrays_of_jax_are_saved(self):
        variables = jax.tree.map(jnp.asarray, _random_variables(_resnet()))
        path = self.folder / "file.safetensors"
        weights.save(str(path), variables, {})
        self.assert_equal(weights.load(str(path), variables), variables)

    def test_any_statistic_without_a_counterpart_is_an_error(self):
        variables = _random_variables(_resnet())
        name = "batch_stats/stem_norm/mean"
        arrays = _flat(variables)
        del arrays[name]
        path = self.write(arrays, "file.safetensors")
        message = self.message(path, variables)
        self.assertIn(f"{name} (8,): in the model alone", message)
        path = self.write(_flat(variables), "file.safetensors")
        shapes = variables | {
            "batch_stats": flax.traverse_util.unflatten_dict(
                {tuple(k.split("/")[1:]): v for k, v in arrays.items() if "stats" in k}
            )
        }
        message = self.message(path, shapes)
        self.assertIn(f"{name} (8,): in the file alone", message)


class SaveTest(_TestCase):
    def test_makes_the_folder_and_leaves_nothing_else_in_it(self):
        path = self.folder / "new" / "file.safetensors"
        for value in (1, 2):
            weights.save(path, {"params": {"w": np.full(3, value)}}, {})
            self.assertEqual([file.name for file in path.parent.iterdir()], [path.name])
        self.assertEqual(safetensors.numpy.load_file(path)["params/w"][0], 2)

    @parameterized.parameters("a/b/file.safetensors", "taken/file.safetensors")
    def test_folder_that_cannot_be_made_is_an_error(self, name):
        (self.folder / "taken").write_text("a file")
        path = self.folder / name
        with pytest.raises(weights.WeightsError, match="cannot be written: "):
            weights.save(path, {"params": {"w": np.ones(3)}}, {})
        self.assertFalse((self.folder / "a").exists())

    @parameterized.parameters("replace", "open")
    def test_a_failure_leaves_the_old_file(self, step):
        path = self.folder / "file.safetensors"
        weights.save(path, {"params": {"w": np.ones(3)}}, {})
        with (
            mock.patch.object(Path, step, side_effect=OSError("no space left")),
            pytest.raises(weights.WeightsError, match="cannot be written: no space"),
        ):
            weights.save(path, {"params": {"w": np.zeros(4)}}, {})
        old = safetensors.numpy.load_file(path)
        np.testing.assert_array_equal(old["params/w"], np.ones(3))

    @parameterized.parameters("file.npz", "file", "file.bin")
    def test_other_extensions_are_an_error(self, name):
        with pytest.raises(weights.WeightsError, match=r"end in \.safetensors"):
            weights.save(self.folder / name, {"params": {"w": np.ones(3)}}, {})


class ErrorTest(_TestCase):
    @parameterized.parameters(
        ("ViT-B_16.npz", "imagenet21k/ViT-B_16.npz"),
        ("ViT-H_14.npz", "imagenet21k/ViT-H_14.npz"),
        ("ViT-L_16-224.npz", "imagenet21k+imagenet2012/ViT-L_16-224.npz"),
        (
            "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0.npz",
            "augreg/Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0.npz",
        ),
    )
    def test_missing_file_of_googles_is_told_where_it_is(self, name, place):
        path = self.folder / name
        message = self.message(path, {})
        self.assertIn(f"{path} does not exist", message)
        self.assertIn(f" https://storage.googleapis.com/vit_models/{place} ", message)
        self.assertIn("--config.init_from= trains from scratch", message)

    @parameterized.parameters("mine.npz", "a/b.safetensors", "ViT-B_16.safetensors")
    def test_any_other_missing_file_is_told_alone(self, name):
        message = self.message(self.folder / name, {})
        self.assertIn(f"{name} does not exist", message)
        self.assertIn("--config.init_from= trains from scratch", message)
        self.assertNotIn("https:", message)

    def test_folder_is_no_file(self):
        self.assertIn("is no file", self.message(self.folder, {}))

    def test_extension_must_be_known(self):
        path = self.folder / "file.pth"
        path.write_bytes(b"weights")
        message = self.message(path, {})
        self.assertIn("file.pth has an unknown extension; known are .npz,", message)

    @parameterized.product(
        extension=[".npz", ".safetensors"], content=[b"", b"abc", b"\x80" * 100]
    )
    def test_file_of_something_else_is_damaged(self, extension, content):
        path = self.folder / f"file{extension}"
        path.write_bytes(content)
        message = self.message(path, {})
        self.assertIn(f"{path} cannot be read as {extension}: ", message)

    @parameterized.parameters(".npz", ".safetensors")
    def test_file_with_an_end_missing_is_damaged(self, extension):
        path = self.write(_google(), f"file{extension}")
        content = path.read_bytes()
        for length in (len(content) - 1, len(content) // 2, 50):
            path.write_bytes(content[:length])
            self.assertIn("cannot be read", self.message(path, _specs(_vit())))

    def test_file_with_a_wrong_byte_is_damaged(self):
        arrays = _google()
        path = self.write(arrays)
        content = bytearray(path.read_bytes())
        content[content.index(arrays["embedding/kernel"].tobytes())] ^= 1
        path.write_bytes(content)
        self.assertIn("cannot be read", self.message(path, _specs(_vit())))

    def test_nothing_is_unpickled(self):
        path = self.folder / "file.npz"
        np.savez(path, cls=np.asarray([None], dtype=object))
        self.assertIn("cls holds object", self.message(path, _specs(_vit())))

    def test_array_without_a_name_is_no_file_of_weights(self):
        path = self.folder / "file.npz"
        with path.open("wb") as file:
            np.save(file, np.ones(3))
        self.assertIn("a single array", self.message(path, _specs(_vit())))

    @parameterized.parameters(
        ({"blocks.0.attn.qkv.weight": np.ones(3), "a": np.ones(3)}, "a, blocks.0"),
        ({}, "none"),
    )
    def test_unknown_layout_names_what_is_there(self, arrays, names):
        for extension in (".npz", ".safetensors"):
            path = self.write(arrays, f"file{extension}")
            message = self.message(path, _specs(_vit()))
            self.assertIn(f"{path}: the layout is unknown", message)
            self.assertIn(f"The first names are: {names}", message)

    def test_array_that_is_there_twice_is_an_error(self):
        variables = _random_variables(_vit(scan=True))
        twice = _flat(variables) | _flat(_random_variables(_vit()))
        path = self.write(twice, "file.safetensors")
        self.assertIn("are the same", self.message(path, _specs(_vit())))

    @parameterized.parameters((np.int32, np.float32), (np.float32, np.int32))
    def test_integers_and_floats_are_not_converted_to_each_other(self, saved, wanted):
        path = self.folder / "file.safetensors"
        count = {"batch_stats": {"count": np.ones(3, saved)}}
        weights.save(path, count, {})
        self.assert_equal(weights.load(path, count), count)
        variables = {"batch_stats": {"count": np.ones(3, wanted)}}
        names = (np.dtype(saved).name, np.dtype(wanted).name)
        self.assertIn(
            "batch_stats/count: {} in the file, {} in the model".format(*names),
            self.message(path, variables),
        )

    @parameterized.parameters(
        (np.nan, "float32"),
        (-np.inf, "float16"),
        (1e39, "float64"),
        (-1e300, "float64"),
    )
    def test_values_that_are_not_finite_are_named(self, value, dtype):
        path = self.folder / "file.safetensors"
        kernel = np.ones((2, 3), dtype)
        kernel[1, 1] = value
        weights.save(path, {"params": {"kernel": kernel, "bias": np.ones(3)}}, {})
        specs = {"params": {"kernel": np.ones((2, 3), "f4"), "bias": np.ones(3, "f4")}}
        message = self.message(path, specs)
        self.assertIn("1 arrays have values that are infinite or NaN", message)
        self.assertIn("params/kernel: 1 of 6 values", message)

    @parameterized.parameters("int32", "complex64", "bool")
    def test_positions_of_another_type_are_not_interpolated(self, dtype):
        variables = _random_variables(_vit())
        flat = _flat(variables)
        (name,) = (name for name in flat if "pos_embed" in name or "positions" in name)
        flat[name] = np.ones((1, 50, flat[name].shape[-1]), dtype)
        path = self.write(flat, "file.safetensors")
        message = self.message(path, _specs(_vit()))
        self.assertIn(f"{dtype} in the file, float32 in the model", message)

    def test_names_that_are_there_twice_are_refused(self):
        npz = self.folder / "file.npz"
        np.savez(npz, **_flat(_random_variables(_vit())))
        with zipfile.ZipFile(npz, "a") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file.writestr(file.namelist()[0], file.read(file.namelist()[0]))
        entry = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
        header = f"{{{entry},{entry}}}".encode()
        twice = self.folder / "file.safetensors"
        twice.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
        for path, part in (
            (npz, "is in it more than once"),
            (twice, "a is in it more than once"),
        ):
            message = self.message(path, _specs(_vit()))
            self.assertIn(part, message)
            self.assertIn(str(path), message)

    def test_file_of_another_model_lists_what_does_not_fit(self):
        path = self.folder / "file.safetensors"
        weights.save(path, _random_variables(_resnet()), {})
        message = self.message(path, _specs(_vit()))
        count = len(
            set(_flat(_random_variables(_resnet()))) ^ set(_flat(_specs(_vit())))
        )
        # The head is one of another width.
        self.assertIn(f"{path}: {count} arrays do not fit", message)
        self.assertLen(message.splitlines(), 12)
        self.assertIn(f"... and {count - 10} more", message)

    def test_every_shape_that_does_not_fit_is_listed(self):
        message = self.message(self.write(_google()), _specs(_vit(patch_size=2), 8))
        self.assertIn("1 arrays do not fit", message)
        self.assertIn(
            "embedding/kernel (params/embedding/kernel): (4, 4, 3, 16) in the file, "
            "(2, 2, 3, 16) in the model",
            message,
        )

    def test_model_with_a_class_token_takes_no_file_without(self):
        path = self.folder / "file.safetensors"
        weights.save(path, _random_variables(_vit(pool="gap")), {})
        message = self.message(path, _specs(_vit()))
        self.assertIn("params/cls (1, 1, 16): in the model alone", message)
        self.assertIn("(1, 16, 16) in the file, (1, 17, 16) in the model", message)


def _safetensors(entries, content=b""):
    """A file with any header; of names and their (dtype, shape, end of the data)."""
    header = entries
    if not isinstance(entries, bytes):
        header = json.dumps(
            {
                name: {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}
                for name, (dtype, shape, end) in entries.items()
            }
        ).encode()
    return len(header).to_bytes(8, "little") + header + content


def _npy(header, content=b""):
    """An array of a .npz file with any header."""
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x02\x00" + len(text).to_bytes(4, "little") + text + content


def _npz(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def _header(shape="(3,)", descr="'<f4'"):
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}"


_STACK = "params/Transformer/encoderblock/LayerNorm_0/scale"
_LONG = f"vit.encoder.layer.{'1' * 5000}.layernorm_before.weight"
_HOSTILE = {
    "a stack of a billion": (
        lambda: _safetensors({_STACK: ("F32", [10**9, 0], 0)}),
        "(1000000000, 0): in the file alone",
    ),
    "a shape without its bytes": (
        lambda: _npz(embedding=_npy(_header(shape=f"({2**40},)"))),
        "is of another size than it says",
    ),
    "a shape beyond all memory": (
        lambda: _npz(embedding=_npy(_header(shape=f"({2**40}, {2**40})"))),
        "cannot be read as .npz",
    ),
    "a bomb that the model does not have": (
        lambda: _npz(
            **{"params/bomb": _npy(_header(shape=f"({2**26},)"), bytes(4 * 2**26))}
        ),
        "params/bomb (67108864,): in the file alone",
    ),
    "positions of a bomb": (
        lambda: _npz(
            **{
                f"params/{_POS_EMBEDDING}": _npy(
                    _header(shape=f"(1, {1 + 2**20}, 16)"), bytes(2**26 + 64)
                )
            }
        ),
        "(1, 1048577, 16) in the file",
    ),
    "eight bits": (
        lambda: _safetensors({"params/a": ("F8_E4M3", [2], 2)}, bytes(2)),
        "params/a is of type F8_E4M3; known are",
    ),
    "text": (lambda: _npz(a=_npy(_header(descr="'<U3'"), bytes(36))), "a holds <U3"),
    "a structure": (
        lambda: _npz(a=_npy(_header(descr="[('x', '<f4')]"), bytes(12))),
        "a holds [('x', '<f4')], not numbers",
    ),
    "a number of 5,000 digits": (
        lambda: _safetensors({_LONG: ("F32", [1], 4)}, bytes(4)),
        "1111 ... 1111",
    ),
    "parentheses": (lambda: _npz(a=_npy("(" * 9000)), "cannot be read as .npz"),
    "a header of half a gigabyte": (
        lambda: _npz(
            a=b"\x93NUMPY\x02\x00"
            + (2**26).to_bytes(4, "little")
            + _header().encode().ljust(2**26)
        ),
        "cannot be read as .npz",
    ),
    "brackets": (lambda: _safetensors(b"[" * 9000), "cannot be read as .safetensors"),
    "a header of a terabyte": (
        lambda: (2**40).to_bytes(8, "little") + b"{}",
        "Its header has 1099511627776 bytes",
    ),
    "a pickle": (lambda: pickle.dumps([1, 2, 3]), "File is not a zip file"),
    "no array": (lambda: _npz(a=b"text"), "cannot be read as .npz"),
    "signs for the terminal": (
        lambda: _safetensors({"params/\x1b[31m\n": ("F32", [1], 4)}, bytes(4)),
        "params/\\x1b[31m\\n (1,): in the file alone",
    ),
    "a name of a megabyte": (
        lambda: _safetensors({"params/" + "a" * 10**6: ("F32", [1], 4)}, bytes(4)),
        "aaa ... aaa",
    ),
    "a hundred thousand names": (
        lambda: _safetensors({f"params/{n}": ("F32", [0], 0) for n in range(100_000)}),
        "It has 100000 names, as no model does",
    ),
}


class HostileTest(_TestCase):
    """Files that are small, or that pack well, and ask for much."""

    @parameterized.named_parameters((name, name) for name in _HOSTILE)
    def test_is_refused_from_its_header_in_few_words(self, name):
        content, part = _HOSTILE[name]
        data = content()
        is_zip = data[:2] == b"PK" or name == "a pickle"
        path = self.folder / ("file.npz" if is_zip else "file.safetensors")
        path.write_bytes(data)
        specs = _specs(_vit())
        tracemalloc.start()
        message = self.message(path, specs)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        self.assertIn(part, message)
        self.assertIn(str(path), message)
        self.assertLess(len(message), 2500)
        self.assertLess(peak, 100 * 2**20 if "thousand" in name else 20 * 2**20)

    def test_a_value_is_read_when_all_fits(self):
        """Of a file with one array too many, none is read."""
        path = self.write(_google() | {"Transformer/more": np.ones(3)})
        with mock.patch.object(np.lib.format, "read_array") as read:
            message = self.message(path, _specs(_vit()))
        self.assertIn("Transformer/more", message)
        read.assert_not_called()

    def test_a_stack_is_read_once(self):
        variables = _random_variables(_vit(scan=True))
        path = self.write(_flat(variables), "file.npz")
        whole = np.lib.format.read_array
        with mock.patch.object(np.lib.format, "read_array", side_effect=whole) as read:
            weights.load(path, _specs(_vit()))
        self.assertEqual(read.call_count, len(_flat(variables)))


if __name__ == "__main__":
    absltest.main()
