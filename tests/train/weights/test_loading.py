"""Files of weights that fit, in three layouts, and what is written."""

import math
from pathlib import Path
from unittest import mock

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from absl.testing import absltest, parameterized

from tests.train.models import vit_reference as reference
from tests.train.weights import tiny_weights as tiny
from train import models, weights
from train.weights.positions import resize


class ReferenceTest(tiny.TestCase):
    def test_vit_b_16_has_the_size_that_is_published(self):
        # Of ViT-B/16 with 1000 classes, as PyTorch's documentation of vit_b_16 has it.
        for shapes in (
            reference.google_shapes(1000, 16, 768, 12, 12, 197),
            reference.hugging_face_shapes(1000, 16, 768, 12, 197),
        ):
            self.assertEqual(sum(map(math.prod, shapes.values())), 86_567_656)


class GoogleTest(tiny.TestCase):
    def test_has_every_name_and_shape_of_vit_b_16(self):
        shapes = reference.google_shapes(1000, 16, 768, 12, 12, 197)
        zero = np.zeros((), np.float16)
        path = self.write({k: np.broadcast_to(zero, v) for k, v in shapes.items()})
        model = models.create("vit_b", 1000, patch_size=16)
        # In the file's dtype, so that the weights are in memory once.
        specs = jax.tree.map(
            lambda spec: jax.ShapeDtypeStruct(spec.shape, zero.dtype),
            tiny.specs(model, 224),
        )
        loaded = weights.load(path, specs)
        self.assert_like(loaded, specs)
        self.assertEqual(
            {f"params/{name}": shape for name, shape in shapes.items()},
            {name: leaf.shape for name, leaf in tiny.flat(loaded).items()},
        )

    @parameterized.product(scan=[False, True])
    def test_logits_are_those_of_an_independent_forward_pass(self, scan):
        model, arrays = tiny.vit(scan=scan), tiny.google()
        specs = tiny.specs(model)
        loaded = weights.load(self.write(arrays), specs)
        self.assert_like(loaded, specs)
        np.testing.assert_allclose(
            tiny.logits(model, loaded),
            reference.google_logits(arrays, tiny.images()),
            rtol=1e-4,
            atol=1e-5,
        )

    def test_class_token_is_left_out_for_a_model_that_has_none(self):
        model, arrays = tiny.vit(pool="gap"), tiny.google()
        loaded = weights.load(self.write(arrays), tiny.specs(model))
        self.assertNotIn("cls", loaded["params"])
        arrays[tiny.POS_EMBEDDING] = arrays[tiny.POS_EMBEDDING][:, 1:]
        np.testing.assert_allclose(
            tiny.logits(model, loaded),
            reference.google_logits(arrays, tiny.images(), pool="gap"),
            rtol=1e-4,
            atol=1e-5,
        )

    def test_class_token_is_left_out_where_no_positions_are_learned(self):
        specs, arrays = (
            tiny.specs(tiny.vit(pool="gap", positions="sincos")),
            tiny.google(),
        )
        del arrays[tiny.POS_EMBEDDING]
        loaded = weights.load(self.write(arrays), specs)
        self.assert_like(loaded, specs)
        np.testing.assert_array_equal(
            loaded["params"]["embedding"]["kernel"], arrays["embedding/kernel"]
        )

    def test_class_token_is_left_out_beside_an_interpolation(self):
        arrays = tiny.google(1 + 36)
        loaded = weights.load(self.write(arrays), tiny.specs(tiny.vit(pool="gap")))
        grid = arrays[tiny.POS_EMBEDDING][0, 1:].reshape(6, 6, tiny.WIDTH)
        np.testing.assert_allclose(
            tiny.flat(loaded["params"])[tiny.POS_EMBEDDING][0],
            reference.interpolate(grid, tiny.GRID).reshape(-1, tiny.WIDTH),
            rtol=1e-5,
            atol=1e-6,
        )

    def test_head_that_reads_another_layer_is_left_out_with_it(self):
        variables = tiny.random_variables(tiny.vit(), seed=1)
        path = self.write(tiny.google(pre_logits=True))
        loaded = weights.load(path, variables)
        for name in ("kernel", "bias"):
            self.assertIs(
                loaded["params"]["head"][name], variables["params"]["head"][name]
            )

    def test_layout_is_told_by_names_and_not_by_the_extension(self):
        arrays, specs = tiny.google(), tiny.specs(tiny.vit())
        self.assert_equal(
            weights.load(self.write(arrays, "file.safetensors"), specs),
            weights.load(self.write(arrays, "file.npz"), specs),
        )


class HuggingFaceTest(tiny.TestCase):
    @parameterized.parameters((False, 1), (False, 2), (False, 4), (True, 2))
    def test_logits_are_those_of_an_independent_forward_pass(self, scan, heads):
        model, arrays = tiny.vit(scan=scan, num_heads=heads), tiny.hugging_face()
        specs = tiny.specs(model)
        loaded = weights.load(self.write(arrays, "file.safetensors"), specs)
        self.assert_like(loaded, specs)
        expected = reference.hugging_face_logits(
            arrays, tiny.images(), heads, reference.gelu_tanh, 1e-6
        )
        np.testing.assert_allclose(
            tiny.logits(model, loaded), expected, rtol=1e-4, atol=1e-5
        )

    def test_logits_are_nearly_those_with_its_own_gelu_and_epsilon(self):
        model, arrays = tiny.vit(), tiny.hugging_face()
        path = self.write(arrays, "file.safetensors")
        logits = tiny.logits(model, weights.load(path, tiny.specs(model)))
        expected = reference.hugging_face_logits(arrays, tiny.images(), tiny.HEADS)
        difference = np.abs(logits - expected).max()
        self.assertBetween(difference, 1e-4, 1e-2)

    def test_model_without_a_classifier_keeps_the_head(self):
        arrays = {
            name.removeprefix("vit."): array
            for name, array in tiny.hugging_face().items()
            if not name.startswith("classifier.")
        }
        arrays["pooler.dense.weight"] = np.ones((tiny.WIDTH, tiny.WIDTH), np.float32)
        arrays["pooler.dense.bias"] = np.ones((tiny.WIDTH,), np.float32)
        arrays["embeddings.mask_token"] = np.ones((1, 1, tiny.WIDTH), np.float32)
        variables = tiny.random_variables(tiny.vit(), seed=1)
        loaded = weights.load(self.write(arrays, "file.safetensors"), variables)
        whole = weights.load(
            self.write(tiny.hugging_face(), "whole.safetensors"), variables
        )
        for name in ("kernel", "bias"):
            kept = variables["params"]["head"][name]
            self.assertIs(loaded["params"]["head"][name], kept)
            whole["params"]["head"][name] = kept
        self.assert_equal(loaded, whole)

    def test_position_embeddings_are_interpolated(self):
        arrays = tiny.hugging_face(1 + 9)
        path = self.write(arrays, "file.safetensors")
        loaded = weights.load(path, tiny.specs(tiny.vit()))
        old = arrays["vit.embeddings.position_embeddings"][0]
        new = tiny.flat(loaded["params"])[tiny.POS_EMBEDDING][0]
        np.testing.assert_array_equal(new[0], old[0])
        np.testing.assert_allclose(
            new[1:],
            reference.interpolate(old[1:].reshape(3, 3, tiny.WIDTH), tiny.GRID).reshape(
                -1, tiny.WIDTH
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
        arrays = tiny.hugging_face() | {name: np.ones((2, 3), np.float32)}
        message = self.message(
            self.write(arrays, "file.safetensors"), tiny.specs(tiny.vit())
        )
        self.assertIn("1 arrays do not fit", message)
        self.assertIn(f"{name} (2, 3): in the file alone", message)

    def test_heads_that_do_not_fit_are_shown_as_they_are(self):
        message = self.message(
            self.write(tiny.hugging_face(), "file.safetensors"),
            tiny.specs(tiny.vit(width=32)),
        )
        self.assertIn(
            "vit.encoder.layer.0.attention.attention.query.weight (params/Transformer/"
            "encoderblock_0/MultiHeadDotProductAttention_1/query/kernel): (16, 16) in "
            "the file, (32, 2, 16) in the model",
            message,
        )


class PositionsTest(tiny.TestCase):
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
        variables = tiny.random_variables(tiny.vit())
        rng = np.random.default_rng(2)
        old_positions = rng.normal(size=(1, 1 + old, tiny.WIDTH)).astype(np.float32)
        arrays = tiny.flat(variables) | {f"params/{tiny.POS_EMBEDDING}": old_positions}
        loaded = weights.load(
            self.write(arrays, "file.safetensors"), tiny.specs(tiny.vit())
        )
        grid = old_positions[0, 1:].reshape(math.isqrt(old), -1, tiny.WIDTH)
        np.testing.assert_allclose(
            tiny.flat(loaded["params"])[tiny.POS_EMBEDDING][0, 1:],
            reference.interpolate(grid, tiny.GRID).reshape(-1, tiny.WIDTH),
            rtol=1e-5,
            atol=1e-6,
        )

    def test_equally_many_positions_are_taken_as_they_are(self):
        arrays = tiny.google(1 + 12)
        model = tiny.vit()
        specs = jax.eval_shape(
            lambda: model.init(jax.random.key(0), jnp.zeros((1, 12, 16, 3)), False)
        )
        loaded = weights.load(self.write(arrays), specs)
        np.testing.assert_array_equal(
            tiny.flat(loaded["params"])[tiny.POS_EMBEDDING], arrays[tiny.POS_EMBEDDING]
        )

    def test_error_says_that_grids_must_be_square(self):
        message = self.message(self.write(tiny.google(1 + 12)), tiny.specs(tiny.vit()))
        self.assertIn(
            "(1, 13, 16) in the file, (1, 17, 16) in the model; only square grids",
            message,
        )

    @parameterized.parameters("cls", "gap")
    def test_model_that_computes_its_positions_takes_none(self, pool):
        specs = tiny.specs(tiny.vit(positions="sincos", pool=pool))
        message = self.message(self.write(tiny.google()), specs)
        self.assertIn("1 arrays do not fit", message)
        self.assertIn(f"{tiny.POS_EMBEDDING} (1, 17, 16): in the file alone", message)


class HeadTest(tiny.TestCase):
    @parameterized.parameters("google", "hugging_face", "own")
    def test_head_of_other_classes_stays_as_it_is(self, layout):
        if layout == "google":
            path = self.write(tiny.google())
        elif layout == "hugging_face":
            path = self.write(tiny.hugging_face(), "file.safetensors")
        else:
            path = self.folder / "own.safetensors"
            weights.save(path, tiny.random_variables(tiny.vit()), {})
        variables = tiny.random_variables(tiny.vit(num_classes=3), seed=1)
        loaded = weights.load(path, variables)
        same = weights.load(path, tiny.specs(tiny.vit()))
        for name, leaf in tiny.flat(loaded).items():
            if name.startswith("params/head/"):
                self.assertIs(leaf, tiny.flat(variables)[name])
            else:
                np.testing.assert_array_equal(leaf, tiny.flat(same)[name], name)
        self.assertEqual(
            same["params"]["head"]["kernel"].shape, (tiny.WIDTH, tiny.CLASSES)
        )

    def test_shape_of_a_head_that_stays_may_be_abstract(self):
        specs = tiny.specs(tiny.vit(num_classes=3))
        loaded = weights.load(self.write(tiny.google()), specs)
        head = specs["params"]["head"]
        self.assertIs(loaded["params"]["head"]["kernel"], head["kernel"])

    def test_half_a_head_is_an_error(self):
        arrays = tiny.google()
        del arrays["head/bias"]
        message = self.message(self.write(arrays), tiny.specs(tiny.vit()))
        self.assertIn("1 arrays do not fit", message)
        self.assertIn("params/head/bias (10,): in the model alone", message)

    @parameterized.parameters(tiny.CLASSES, 3)
    def test_head_of_another_width_is_an_error(self, classes):
        arrays = tiny.google() | {"head/kernel": np.ones((7, tiny.CLASSES), np.float32)}
        message = self.message(
            self.write(arrays), tiny.specs(tiny.vit(num_classes=classes))
        )
        self.assertIn(f"(7, 10) in the file, (16, {classes}) in the model", message)


class OwnTest(tiny.TestCase):
    @parameterized.parameters(
        (tiny.vit(),),
        (tiny.vit(scan=True),),
        (tiny.vit(pool="gap", positions="sincos"),),
        (tiny.resnet(),),
        (tiny.resnet(stem="imagenet"),),
    )
    def test_round_trip(self, model):
        variables = tiny.random_variables(model)
        path = self.folder / "file.safetensors"
        weights.save(path, variables, {"step": "3"})
        loaded = weights.load(path, tiny.specs(model))
        self.assert_equal(loaded, variables)
        plain = safetensors.numpy.load_file(path)
        self.assert_equal(flax.traverse_util.unflatten_dict(plain, sep="/"), variables)
        with safetensors.safe_open(path, "np") as file:
            self.assertEqual(file.metadata(), {"step": "3"})

    def test_resnet_has_statistics(self):
        self.assertIn("batch_stats", tiny.random_variables(tiny.resnet()))

    @parameterized.parameters((False, True), (True, False))
    def test_scanned_and_looped_blocks_take_each_others_file(self, saved, loaded):
        variables = tiny.random_variables(tiny.vit(scan=saved))
        path = self.folder / "file.safetensors"
        weights.save(path, variables, {})
        model = tiny.vit(scan=loaded)
        other = weights.load(path, tiny.specs(model))
        self.assert_like(other, tiny.specs(model))
        np.testing.assert_allclose(
            tiny.logits(model, other),
            tiny.logits(tiny.vit(scan=saved), variables),
            rtol=1e-5,
            atol=1e-5,
        )
        name = f"encoderblock_1/{tiny.KERNEL}"
        stacked, apart = (variables, other) if saved else (other, variables)
        np.testing.assert_array_equal(
            tiny.flat(apart["params"]["Transformer"])[name],
            tiny.flat(stacked["params"]["Transformer"])[f"encoderblock/{tiny.KERNEL}"][
                1
            ],
        )

    def test_scanned_blocks_are_of_the_number_that_the_model_has(self):
        path = self.folder / "file.safetensors"
        weights.save(path, tiny.random_variables(tiny.vit(scan=True)), {})
        message = self.message(path, tiny.specs(tiny.vit(scan=True, num_layers=3)))
        self.assertIn("16 arrays do not fit", message)
        self.assertIn(f"params/Transformer/encoderblock_2/{tiny.KERNEL}", message)

    @parameterized.parameters(jnp.bfloat16, np.float16, np.float64)
    def test_other_floating_types_become_the_variables(self, dtype):
        variables = tiny.random_variables(tiny.resnet())
        low = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)
        expected = jax.tree.map(lambda leaf: leaf.astype(np.float32), low)
        for name in ("file.safetensors", "file.npz"):
            path = self.write(tiny.flat(low), name)
            loaded = weights.load(path, tiny.specs(tiny.resnet()))
            self.assert_like(loaded, tiny.specs(tiny.resnet()))
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
        arrays = {k: v.astype(dtype) for k, v in tiny.google(1 + 9).items()}
        wide = {k: v.astype(np.float32) for k, v in arrays.items()}
        specs = tiny.specs(tiny.vit())
        self.assert_equal(
            weights.load(self.write(arrays), specs),
            weights.load(self.write(wide, "wide.npz"), specs),
        )

    def test_empty_collection_stays_and_is_not_written(self):
        variables = tiny.random_variables(tiny.vit()) | {"batch_stats": {}}
        path = self.folder / "file.safetensors"
        weights.save(path, variables, {})
        self.assert_equal(weights.load(path, variables), variables)
        self.assertNotIn("batch_stats", weights.load(path, tiny.specs(tiny.vit())))

    def test_what_is_saved_does_not_depend_on_its_layout_in_memory(self):
        kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
        scalar = np.asarray(2, np.float32)
        path = self.folder / "file.safetensors"
        weights.save(path, {"params": {"w": kernel.T, "s": scalar}}, {})
        plain = safetensors.numpy.load_file(path)
        np.testing.assert_array_equal(plain["params/w"], kernel.T)
        self.assertEqual(plain["params/s"].shape, ())

    def test_arrays_of_jax_are_saved(self):
        variables = jax.tree.map(jnp.asarray, tiny.random_variables(tiny.resnet()))
        path = self.folder / "file.safetensors"
        weights.save(str(path), variables, {})
        self.assert_equal(weights.load(str(path), variables), variables)

    def test_any_statistic_without_a_counterpart_is_an_error(self):
        variables = tiny.random_variables(tiny.resnet())
        name = "batch_stats/stem_norm/mean"
        arrays = tiny.flat(variables)
        del arrays[name]
        path = self.write(arrays, "file.safetensors")
        message = self.message(path, variables)
        self.assertIn(f"{name} (8,): in the model alone", message)
        path = self.write(tiny.flat(variables), "file.safetensors")
        shapes = variables | {
            "batch_stats": flax.traverse_util.unflatten_dict(
                {tuple(k.split("/")[1:]): v for k, v in arrays.items() if "stats" in k}
            )
        }
        message = self.message(path, shapes)
        self.assertIn(f"{name} (8,): in the file alone", message)


class SaveTest(tiny.TestCase):
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


if __name__ == "__main__":
    absltest.main()
