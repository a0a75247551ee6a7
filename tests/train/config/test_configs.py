"""The configs: each trains on images of its dataset's kind, and fits what it is for."""

import functools
import importlib
import json
import math
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from absl.testing import absltest, parameterized

from dropit_jax import memory
from tests.train import commands
from tests.train.models import vit_reference
from train import models, weights
from train.engine import step as step_lib
from train.runs import records

_ROOT = Path(__file__).parents[3]
_DATA = _ROOT / "tests" / "data" / "tensorflow_datasets"
_FILES = sorted(path.stem for path in (_ROOT / "configs").glob("*.py"))
# Not the grids, which have a test of their own (test_ablation).
_NAMES = tuple(name for name in _FILES if not name.startswith("ablation_"))

# Batches of 8, of 48 images: these are steps of one epoch.
_STEPS = 3
# The configs that are trained, and what makes a step cheap and leaves what the config
# is about. Images of 32x32 are four patches, and 8x8 where an ImageNet ResNet's blocks
# begin; all ResNets but that of the digits have two blocks. The steps of all others
# are compiled: their datasets and models are trained here too, in other pairs.
_CHEAP = {
    "digits_resnet18": ("--config.model.width=4",),
    "resnet18_cifar100": ("--config.model.width=4",),
    "resnet18_imagenet": (
        "--config.model.width=4",
        "--config.image_size=32",
        "--config.workers=0",
    ),
    # One block of width 32; test_weights has the names and shapes of ViT-B/16.
    "vit_b16_cifar100": (
        "--config.model.name=vit_mu",
        "--config.image_size=32",
        "--config.workers=1",
    ),
    # Blocks in a loop, of which one is compiled.
    "vit_ti16_cifar10": (
        "--config.image_size=32",
        "--config.workers=0",
        "--config.model.scan=true",
    ),
}
# Trained from a file of weights; and, as in the paper, what test_loop trains as it is.
_PRETRAINED, _DIGITS = "vit_b16_cifar100", "digits_resnet18"
# Of the class token in the file of weights, and far from what training makes of 0.
_CLS = 5.0


def _config(file):
    name, _, variant = file.partition(":")
    return importlib.import_module(f"configs.{name}").get_config(variant)


def _google_file(path):
    """A file as Google publishes it after training on ImageNet-21k, of one block."""
    positions = 1 + (224 // 16) ** 2
    shapes = vit_reference.google_shapes(
        21843, 16, 32, 1, 2, positions, pre_logits=True
    )
    rng = np.random.default_rng(0)
    # It is only in the head, which no config takes, that there are so many.
    arrays = {
        name: np.zeros(shape, np.float32)
        if name.startswith("head/")
        else 0.02 * rng.standard_normal(shape, np.float32)
        for name, shape in shapes.items()
    }
    arrays["cls"] += np.float32(_CLS)
    np.savez(path, **arrays)


class RunTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.directory = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))

    def _run(self, file, workdir, *more):
        self.addCleanup(shutil.rmtree, workdir, ignore_errors=True)
        name = file.partition(":")[0]
        return commands.run(
            "train.main",
            f"--config=configs/{name}.py{file.removeprefix(name)}",
            f"--workdir={workdir}",
            f"--config.data_dir={_DATA}",
            "--config.batch_size=8",
            f"--config.num_steps={_STEPS}",
            *_CHEAP[name],
            *more,
            small=name != _DIGITS,
        )

    def _check(self, file, *more):
        """Runs a config: what it was resolved to."""
        workdir = self.directory / file.replace(":", "_")
        status, out, errors = self._run(file, workdir, *more)
        self.assertEqual((status, errors), (0, ""))
        self.assertIn(f"step {_STEPS}", out)
        (row,) = records.read(workdir / "metrics.csv")
        self.assertEqual((row["step"], row["epoch"]), (_STEPS, 1))
        for name, value in row.items():
            self.assertTrue(math.isfinite(value), name)
        self.assertGreater(row["train_loss"], 0)
        self.assertEqual(commands.steps(workdir), [_STEPS])
        return workdir, json.loads((workdir / "config.json").read_text())

    def test_every_config_is_tested(self):
        self.assertEqual(set(_NAMES), set(_CHEAP) | set(_PUBLISHED))

    @parameterized.parameters(*sorted(set(_CHEAP) - {_PRETRAINED, _DIGITS}))
    def test_trains(self, name):
        _, config = self._check(name)
        self.assertEqual(config["dropit"]["rate"], "preset")

    def test_trains_from_googles_weights(self):
        pretrained = self.directory / "ViT-B_16.npz"
        _google_file(pretrained)
        workdir, _ = self._check(_PRETRAINED, f"--config.init_from={pretrained}")
        output = workdir / "model.safetensors"
        status, _, errors = commands.run(
            "train.export", f"--workdir={workdir}", f"--output={output}"
        )
        self.assertEqual((status, errors), (0, ""))
        with safetensors.safe_open(output, "numpy") as file:
            cls = file.get_tensor("params/cls")
        np.testing.assert_allclose(cls, _CLS, atol=0.2)

    @parameterized.parameters("vit_b16_cifar100", "vit_b16_imagenet")
    def test_says_where_googles_weights_are(self, name):
        path = _config(name).init_from
        with pytest.raises(weights.WeightsError, match=r"imagenet21k/ViT-B_16\.npz :"):
            weights.load(path, {})

    def test_trains_as_the_paper_does(self):
        _, config = self._check(f"{_DIGITS}:paper")
        self.assertEqual((config["memory"], config["layers"]), ("baseline", "dropit"))
        policy = {k: v for k, v in config["dropit"].items() if v != "preset"}
        expected = {
            "rate": 0.8,
            "chunk_size": 2**14,
            "selection": "top_k",
            "value_dtype": None,
        }
        self.assertEqual(policy, expected)


class _Counts:
    """What there is to a model, counted by hand.

    Attributes:
      params: how many parameters.
      stats: how many running means and variances.
      macs: multiplications with an addition, for an image, in the forward pass.
      first_macs: of these, those of the layer that reads the image.
      score_macs: of these, those of queries with keys.
    """

    def __init__(self, params, stats, macs, first_macs, score_macs=0):
        self.params, self.stats = params, stats
        self.macs, self.first_macs = macs, first_macs
        self.score_macs = score_macs

    @property
    def step_flops(self):
        """For an image: forward, gradients of kernels, gradients of inputs.

        No gradient is wanted of the image.
        """
        return 2 * (3 * self.macs - self.first_macs)


def _resnet18(size, width, classes, stem, channels=3, blocks=2):
    kernel, shrinks, pool = {"cifar": (3, 1, 1), "imagenet": (7, 2, 2)}[stem]
    side = size // shrinks
    kernels, norms = kernel**2 * channels * width, width
    macs = first_macs = side**2 * kernels
    side //= pool
    features = width
    for stage in range(4):
        out = width * 2**stage
        side //= 1 if stage == 0 else 2
        layers = [9 * features * out] + (2 * blocks - 1) * [9 * out * out]
        norms += 2 * blocks * out
        if stage > 0:
            layers.append(features * out)
            norms += out
        kernels += sum(layers)
        macs += side**2 * sum(layers)
        features = out
    params = kernels + 2 * norms + (features + 1) * classes
    return _Counts(params, 2 * norms, macs + features * classes, first_macs)


def _vit(
    size, patch, width, classes, layers=12, token=True, positions=True, channels=3
):
    patches = (size // patch) ** 2
    tokens = patches + token
    pixels = patch**2 * channels
    # Four kernels of the attention, and two of four times the size.
    kernels = layers * 12 * width**2
    # Their biases, and two norms.
    vectors = layers * (4 + 5 + 4) * width
    params = (pixels + 1) * width + kernels + vectors + 2 * width
    params += (token + positions * tokens) * width + (width + 1) * classes
    macs = tokens * kernels + layers * 2 * tokens**2 * width + width * classes
    first_macs = patches * pixels * width
    scores = layers * tokens**2 * width
    return _Counts(params, 0, macs + first_macs, first_macs, scores)


_LAPTOP = 4 * 2**30  # bytes
_H100 = memory.device_bytes("h100")

# Of each kind of model, one config: the batch, the side of the images and their
# channels, what counts the model, and the memory that it has to do with.
_PUBLISHED = {
    "digits_vit": (
        (64, 8, 1),
        functools.partial(_vit, 8, 2, 32, 10, layers=1, token=False, channels=1),
        _LAPTOP,
    ),
    "resnet18_cifar10": (
        (128, 32, 3),
        functools.partial(_resnet18, 32, 64, 10, "cifar"),
        _LAPTOP,
    ),
    "resnet18_imagenet": (
        (256, 224, 3),
        functools.partial(_resnet18, 224, 64, 1000, "imagenet"),
        _H100,
    ),
    "vit_b16_imagenet": (
        (512, 224, 3),
        functools.partial(_vit, 224, 16, 768, 1000),
        _H100,
    ),
    "vit_ti16_cifar10": (
        (128, 128, 3),
        functools.partial(_vit, 128, 16, 192, 10, token=False, positions=False),
        _LAPTOP,
    ),
}


# A ResNet-18 of half of its blocks.
_ONE_BLOCK_EACH = models._resnet(models.BasicBlock, 1, 1, 1, 1)


def _argument_bytes(name, model):
    """The bytes of a step's state, and of its batch."""
    (batch, side, channels), _, _ = _PUBLISHED[name]
    # Parameters and momentum; two counts of steps and two words of random state.
    state = 4 * (2 * model.params + model.stats) + 4 * (2 + 2)
    # A label and a mask beside every image.
    return state, batch * (side**2 * channels + 4 + 4)


class CompileTest(parameterized.TestCase):
    @parameterized.parameters(
        (_resnet18(224, 64, 1000, "imagenet"), 11_689_512, 1.814e9),  # torchvision
        (_resnet18(32, 64, 10, "cifar"), 11_173_962, 0.556e9),  # pytorch-cifar
        (_vit(224, 16, 768, 1000), 86_567_656, 17.56e9),  # torchvision
        (_vit(224, 16, 192, 1000), 5_717_416, 1.26e9),  # timm
    )
    def test_what_is_counted_by_hand_is_what_others_count(self, model, params, macs):
        self.assertEqual(model.params, params)
        self.assertAlmostEqual(model.macs / macs, 1, delta=0.01)

    @parameterized.parameters(*_PUBLISHED)
    def test_the_arguments_are_what_they_are_said_to_be(self, name):
        (batch, side, channels), model, _ = _PUBLISHED[name]
        _, args = step_lib.abstract(_config(name))
        leaves = jax.tree.leaves(args)
        images = [leaf.shape for leaf in leaves if leaf.dtype == jnp.uint8]
        self.assertEqual(images, [(batch, side, side, channels)])
        nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        self.assertEqual(nbytes, sum(_argument_bytes(name, model())))

    @parameterized.parameters(
        "digits_vit:paper", *sorted({*_PUBLISHED} - {"digits_vit"})
    )
    def test_the_whole_step_is_what_it_is_said_to_be(self, file):
        name = file.partition(":")[0]
        (batch, _, _), make, available = _PUBLISHED[name]
        config, model, most_bytes = _config(file), make(), available
        if name.startswith("vit_"):
            # One block is compiled, and counts for all; the step takes more memory.
            config.model.scan = True
        elif name.startswith("resnet18_"):
            # Of the two blocks of each stage, one is compiled, which takes more than
            # half of their memory.
            self.enterContext(mock.patch.dict(models._MODELS, resnet18=_ONE_BLOCK_EACH))
            model, most_bytes = make(blocks=1), available / 2
        step, args = step_lib.abstract(config)
        report = memory.compile_report(step, *args, target="h100", donate=0)
        state, others = _argument_bytes(name, model)
        self.assertEqual(report.argument_bytes, state + others)
        self.assertEqual(report.aliased_bytes, state)
        self.assertGreater(report.temp_bytes, 0)
        self.assertLess(report.peak_bytes, most_bytes)
        expected = batch * model.step_flops
        # Scores are cheaper to compute twice than to store, for `drop`.
        most = expected + batch * 2 * model.score_macs
        self.assertBetween(report.flops, 0.99 * expected, 1.01 * most)


if __name__ == "__main__":
    absltest.main()
