"""Tiny models, their variables, and files of them in three layouts."""

import functools
import tempfile
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from absl.testing import parameterized

from tests.train.models import vit_reference as reference
from train import weights
from train.models.resnet import ResNet
from train.models.vit import ViT

CLASSES, PATCH, WIDTH, LAYERS, HEADS = 10, 4, 16, 2, 2
SIZE = 16
GRID = SIZE // PATCH
POSITIONS = 1 + GRID**2
KERNEL = "MlpBlock_3/Dense_0/kernel"
POS_EMBEDDING = "Transformer/posembed_input/pos_embedding"


def vit(**fields):
    sizes = {
        "num_classes": CLASSES,
        "patch_size": PATCH,
        "width": WIDTH,
        "num_layers": LAYERS,
        "num_heads": HEADS,
    }
    return ViT(**(sizes | fields))


def resnet(**fields):
    return ResNet(
        **({"num_classes": CLASSES, "stage_sizes": (1, 1), "width": 8} | fields)
    )


def specs(model, size=SIZE):
    """What `init` would make, as plain dicts, without making it."""
    return jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, size, size, 3)), False)
    )


def random(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: (
            rng.normal(size=shape) * 0.3 + ("scale" in name or "norm" in name)
        ).astype(np.float32)
        for name, shape in shapes.items()
    }


def random_variables(model, size=SIZE, seed=0):
    shapes = {name: spec.shape for name, spec in flat(specs(model, size)).items()}
    return nested(random(shapes, seed))


def google(positions=POSITIONS, classes=CLASSES, **kwargs):
    return random(
        reference.google_shapes(
            classes, PATCH, WIDTH, LAYERS, HEADS, positions, **kwargs
        )
    )


def hugging_face(positions=POSITIONS):
    return random(
        reference.hugging_face_shapes(CLASSES, PATCH, WIDTH, LAYERS, positions)
    )


def flat(variables):
    return flax.traverse_util.flatten_dict(variables, sep="/")


def nested(arrays):
    return flax.traverse_util.unflatten_dict(arrays, sep="/")


def images(size=SIZE):
    shape = (3, size, size, 3)
    return np.random.default_rng(5).normal(size=shape).astype(np.float32)


def logits(model, variables, x=None):
    x = images() if x is None else x
    return np.asarray(jax.jit(lambda v, x: model.apply(v, x, False))(variables, x))


class TestCase(parameterized.TestCase):
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
        for name, spec in flat(specs).items():
            leaf = flat(variables)[name]
            self.assertIsInstance(leaf, np.ndarray, name)
            self.assertEqual((leaf.shape, leaf.dtype), (spec.shape, spec.dtype), name)

    def message(self, path, variables):
        with pytest.raises(weights.WeightsError) as caught:
            weights.load(path, variables)
        return str(caught.value)
