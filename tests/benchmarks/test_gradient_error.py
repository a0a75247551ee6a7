import csv
import dataclasses
import tempfile
import types
from pathlib import Path
from unittest import mock

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import gradient_error
from benchmarks.workloads import layer_captures
from benchmarks.workloads.layer_captures import Layer
from configs import digits_resnet18, digits_vit
from dropit_jax import DropIT
from train import data, models
from train.config import config as config_lib
from train.config.config import ConfigError
from train.engine import step as step_lib
from train.models.resnet import BasicBlock
from train.system.terminal import Terminal


def _tiny(config, steps=2):
    config.image_size = 8
    config.batch_size = 16
    config.num_epochs = None
    config.num_steps = steps
    if config.model.name == "resnet18":
        config.model.width = 4
    return config


def _of_two_blocks():
    """In it, "resnet18" is a ResNet of two stages, each of a block."""
    tiny = dataclasses.replace(
        models._MODELS["resnet18"], sizes={"block": BasicBlock, "stage_sizes": (1, 1)}
    )
    return mock.patch.dict(models._MODELS, resnet18=tiny)


def _batch(config):
    dataset = data.load(config.dataset, "", config.image_size, config.augmentation)
    return data.first_batch(dataset, config.batch_size, config.seed)


class CaptureTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.enterContext(_of_two_blocks())

    @parameterized.parameters(digits_resnet18, digits_vit)
    def test_kernel_gradients_are_those_of_the_training_step(self, file):
        config = config_lib.plain(_tiny(file.get_config()))
        config.label_smoothing = 0.0  # as captured
        state, batch = step_lib.initialise(config), _batch(config)
        layers = layer_captures.capture(config, state, batch)
        key = jax.random.key(0)
        gradients, _ = jax.jit(step_lib.gradient(config))(
            state.params, state.batch_stats, batch, key
        )
        kernels = {
            jax.tree_util.keystr(path[:-1], simple=True, separator="/"): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)
            if path[-1].key == "kernel"
        }
        self.assertEqual({layer.name for layer in layers}, set(kernels))
        found = jax.jit(
            lambda: {layer.name: layer.kernel_gradient(layer.x) for layer in layers}
        )()
        chex.assert_trees_all_close(found, kernels, rtol=1e-3, atol=1e-5)

    def test_a_layer_that_is_called_twice_is_refused(self):
        class Twice(nn.Module):
            @nn.compact
            def __call__(self, x, train):
                dense = nn.Dense(1, name="dense")
                return dense(dense(x))

        config = config_lib.plain(_tiny(digits_resnet18.get_config()))
        params = {"dense": {"kernel": jnp.ones((1, 1)), "bias": jnp.ones(1)}}
        state = types.SimpleNamespace(params=params, batch_stats={})
        with (
            mock.patch.object(step_lib, "create_model", return_value=Twice()),
            pytest.raises(ValueError, match="dense is called twice"),
        ):
            layer_captures.capture(config, state, _batch(config))


class MeasureTest(parameterized.TestCase):
    def layer(self):
        rng = np.random.default_rng(0)
        x, cotangent = (
            jnp.asarray(rng.normal(size=shape), jnp.float32)
            for shape in ((6, 32), (6, 5))
        )
        module = nn.Dense(5)
        params = module.init(jax.random.key(0), x)["params"]
        return Layer("dense", module, params, x, cotangent)

    @parameterized.parameters((0.5, 16), (0.75, 8), (0.875, 32))
    def test_errors_are_those_of_a_product_by_hand(self, rate, chunk_size):
        layer = self.layer()
        policy = DropIT(rate=rate, chunk_size=chunk_size)
        (measured,) = gradient_error.measure(layer, {"p": ("family", policy)})

        chunks = np.asarray(layer.x).reshape(-1, chunk_size).copy()
        kept = round((1 - rate) * chunk_size)
        for chunk in chunks:
            chunk[np.argsort(np.abs(chunk))[:-kept]] = 0
        exact = np.asarray(layer.x).T @ np.asarray(layer.cotangent)
        gradient = chunks.reshape(6, 32).T @ np.asarray(layer.cotangent)
        norm = np.linalg.norm
        np.testing.assert_allclose(
            (measured.error, measured.cosine),
            (
                norm(gradient - exact) / norm(exact),
                np.vdot(gradient, exact) / norm(gradient) / norm(exact),
            ),
            rtol=1e-4,
        )
        index_bits = 4 if chunk_size <= 16 else 8
        bits = min(kept / chunk_size * index_bits, 1)  # or a bitmap
        self.assertAlmostEqual(measured.bits, kept / chunk_size * 32 + bits, places=5)
        self.assertGreater(measured.compress_ns, 0)

    def test_with_nothing_dropped_nothing_is_wrong(self):
        policy = DropIT(rate=0.0)
        (measured,) = gradient_error.measure(self.layer(), {"p": ("family", policy)})
        self.assertEqual((measured.error, measured.bits), (0.0, 32.0))
        self.assertAlmostEqual(measured.cosine, 1, places=5)


class FrontTest(parameterized.TestCase):
    @settings(deadline=None, max_examples=50)
    @given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1))
    def test_no_one_beats_those_on_the_front(self, points):
        errors = [
            gradient_error.Error("f", str(i), "l", 1, bits, error, 0, 1)
            for i, (bits, error) in enumerate(points)
        ]
        best = {(each.bits, each.error) for each in gradient_error.front(errors)}
        beaten = {
            (x, y)
            for x, y in points
            if any((a <= x and b <= y and (a, b) != (x, y)) for a, b in points)
        }
        self.assertEqual(best, set(points) - beaten)

    def test_the_winner_has_the_least_error_within_the_bits(self):
        errors = [
            gradient_error.Error(family, policy, "l", 1, bits, error, 0, 1)
            for family, policy, bits, error in (
                ("a", "cheap", 0.75, 0.5),
                ("a", "better", 2.0, 0.25),
                ("b", "best", 2.5, 0.125),
                ("b", "beaten", 8.0, 0.375),
            )
        ]
        config = digits_resnet18.get_config()
        rows = gradient_error.to_markdown(errors, [], config).splitlines()
        self.assertIn("| bits an element | a | b | winner |", rows)
        self.assertIn("| 0.5 | - | - | - |", rows)
        self.assertIn("| 1 | 0.5000 | - | cheap |", rows)
        self.assertIn("| 2 | 0.2500 | - | better |", rows)
        self.assertIn("| 8.5 | 0.2500 | 0.1250 | best |", rows)

    def test_means_weigh_bits_by_elements(self):
        errors = [
            gradient_error.Error("f", "p", "one", 100, 4.0, 0.1, 0.9, 1.0),
            gradient_error.Error("f", "p", "two", 300, 8.0, 0.3, 0.7, 3.0),
        ]
        (mean,) = gradient_error.averaged(errors)
        self.assertEqual((mean.elements, mean.bits, mean.compress_ns), (400, 7.0, 2.5))
        self.assertAlmostEqual(mean.error, 0.2)
        self.assertAlmostEqual(mean.cosine, 0.8)


class CommandTest(parameterized.TestCase):
    def test_the_grid_has_every_strategy_rate_size_type_and_fill(self):
        policies = [policy for _, policy in gradient_error.grid().values()]
        self.assertLen(set(policies), len(policies))
        rates = (0.5, 0.75, 0.875, 0.95, 0.99)
        sizes = (8, 16, 32, 64, 256, 2048, 2**14, None)
        types = ("bfloat16", "float16", "int8", "int4", "int2")
        wanted = [
            DropIT(rate, strategy, chunk_size=size)
            for rate in rates
            for strategy in ("min_k", "random")
            for size in sizes
        ]
        wanted += [
            DropIT(rate, strategy, "channel")
            for rate in rates
            for strategy in ("min_k", "random")
        ]
        wanted += [
            DropIT(rate, value_dtype=value_dtype, fill=fill)
            for rate in rates
            for value_dtype in (None, *types)
            for fill in ("zero", "mean")
        ]
        wanted += [DropIT(0.0, value_dtype=value_dtype) for value_dtype in types]
        self.assertEqual(set(policies), set(wanted))

    def test_it_trains_measures_and_writes(self):
        self.enterContext(_of_two_blocks())
        directory = Path(self.enterContext(tempfile.TemporaryDirectory()))
        output = directory / "results"
        names = ("87.5% D=16", "50.0% D=64", "0.0% int8")
        policies = {name: gradient_error.grid()[name] for name in names}
        config = _tiny(digits_resnet18.get_config(), steps=2)
        terminal = Terminal(quiet=True)
        found = []

        def capture(*arguments):  # once for all, as compilation takes long
            found.extend([] if found else layer_captures.capture(*arguments))
            return found

        self.enterContext(mock.patch.object(gradient_error, "capture", capture))
        gradient_error.run(config, directory / "run", output, policies, 2, terminal)
        with (output / "gradient_error.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        layers = ("stage1_block1/conv1", "head")
        self.assertNotIn("shortcut", (output / "gradient_error.md").read_text())
        self.assertEqual(
            [(row["layer"], row["policy"]) for row in rows],
            [(layer, name) for layer in layers for name in names],
        )
        page = (output / "gradient_error.md").read_text()
        for name in names:
            self.assertIn(name, page)
        for name in ("gradient_error.png", "gradient_error_chunks.png"):
            self.assertIn(f"({name})", page)
            self.assertGreater((output / name).stat().st_size, 1000)

        # A shortcut of stride 2 is not among them: it does not read all positions. A
        # mean takes the four convolutions, which read 8x8 or 4x4, and not the head.
        with_mean = policies | {"mean": ("f", DropIT(fill="mean"))}
        for asked, suited in ((policies, 5), (with_mean, 4)):
            with pytest.raises(ConfigError, match=f"=100: the model has {suited} that"):
                gradient_error.run(
                    config, directory / "run", output, asked, 100, terminal
                )


if __name__ == "__main__":
    absltest.main()
