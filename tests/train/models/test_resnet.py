import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from dropit_jax import DropIT
from tests.dropit_jax import reference
from train import models
from train.models import layers
from train.models.resnet import BasicBlock, BottleneckBlock, ResNet


def _variables(model, shape):
    return jax.eval_shape(
        lambda x: model.init(jax.random.key(0), x, False), jnp.zeros(shape)
    )


def _count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _random(model, shape):
    """Variables none of which is at its special first value, such as 0."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: np.float32(rng.uniform(0.1, 1, leaf.shape) / np.sqrt(leaf.size)),
        _variables(model, shape),
    )


def _images(size):
    images = np.random.default_rng(0).normal(size=(2, size, size, 3))
    return jnp.asarray(images, jnp.float32)


def _outputs(model, shape):
    """The shape of what each module gives, by its path."""
    _, state = jax.eval_shape(
        lambda x: model.init_with_output(
            jax.random.key(0), x, False, capture_intermediates=True
        ),
        jnp.zeros(shape),
    )
    flat = jax.tree.leaves_with_path(state["intermediates"])
    return {"/".join(key.key for key in path[:-2]): x.shape for path, x in flat}


class ArchitectureTest(parameterized.TestCase):
    @parameterized.parameters(
        # torchvision's.
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
    )
    def test_has_the_published_number_of_parameters(self, name, count):
        model = models.create(name, 1000, stem="imagenet")
        params = _variables(model, (1, 224, 224, 3))["params"]
        self.assertEqual(_count(params), count)

    def test_cifars_stem_differs_in_the_first_kernel_alone(self):
        params = {
            stem: _variables(ResNet(1000, stem=stem), (1, 64, 64, 3))["params"]
            for stem in ("cifar", "imagenet")
        }
        self.assertEqual(
            _count(params["imagenet"]) - _count(params["cifar"]), (49 - 9) * 3 * 64
        )

    @parameterized.product(
        stem=(("cifar", 32, (4, 4)), ("imagenet", 64, (2, 2))),
        block=((BasicBlock, 32), (BottleneckBlock, 128)),
    )
    def test_downsamples_as_published(self, stem, block):
        (stem, size, final), (block, features) = stem, block
        model = ResNet(10, width=4, stem=stem, block=block)
        outputs = _outputs(model, (2, size, size, 3))
        self.assertEqual(outputs["stage4_block2"], (2, *final, features))

    def test_a_bottleneck_is_torchvisions(self):
        # Its layer3.0 and layer1.0: stride on the 3x3, not on the first 1x1.
        model = models.create("resnet50", 1000, stem="imagenet")
        outputs = _outputs(model, (1, 224, 224, 3))
        expected = {"conv1": (28, 256), "conv2": (14, 256), "conv3": (14, 1024)}
        expected["shortcut_conv"] = (14, 1024)
        for conv, (size, features) in expected.items():
            self.assertEqual(
                outputs[f"stage3_block1/{conv}"], (1, size, size, features), conv
            )
        params = _variables(model, (1, 224, 224, 3))["params"]
        kernels = {
            name: layer["kernel"].shape
            for name, layer in params["stage1_block1"].items()
            if "kernel" in layer
        }
        self.assertEqual(
            kernels,
            {
                "conv1": (1, 1, 64, 64),
                "conv2": (3, 3, 64, 64),
                "conv3": (1, 1, 64, 256),
                "shortcut_conv": (1, 1, 64, 256),
            },
        )
        self.assertNotIn("shortcut_conv", params["stage1_block2"])

    @parameterized.parameters(
        (BasicBlock, {"conv1", "conv2", "norm1", "norm2"}),
        (
            BottleneckBlock,
            {"conv1", "conv2", "conv3", "norm1", "norm2", "norm3"},
        ),
    )
    def test_parameters_have_their_names(self, block, names):
        model = ResNet(10, (1, 1), width=4, block=block)
        params = _variables(model, (1, 16, 16, 3))["params"]
        self.assertEqual(
            set(params),
            {"stem_conv", "stem_norm", "stage1_block1", "stage2_block1", "head"},
        )
        self.assertEqual(
            set(params["stage2_block1"]), names | {"shortcut_conv", "shortcut_norm"}
        )

    def test_another_stem_is_refused(self):
        with pytest.raises(ValueError, match=r"ResNet\.stem: unknown value 'mnist'"):
            _variables(ResNet(10, stem="mnist"), (1, 8, 8, 3))


class LayersTest(parameterized.TestCase):
    @parameterized.parameters(
        ("dots", {"stem": "imagenet"}),
        ("blocks", {"block": BottleneckBlock, "dtype": jnp.bfloat16}),
    )
    def test_of_dropit_change_neither_parameters_nor_output(self, remat, fields):
        x = _images(8)
        plain = ResNet(10, (1,), width=4, **fields)
        other = plain.clone(layers=layers.dropit(DropIT(0.75)), remat=remat)
        variables = _random(plain, x.shape)
        chex.assert_trees_all_equal_shapes_and_dtypes(
            variables, _variables(other, x.shape)
        )
        outputs = [
            jax.jit(lambda v, m=m: m.apply(v, x, False))(variables)
            for m in (plain, other)
        ]
        self.assertGreater(float(jnp.std(outputs[0])), 1e-3)
        reference.assert_same_bits(*outputs)


class DtypeTest(parameterized.TestCase):
    @parameterized.parameters("resnet18", "resnet50")
    def test_the_computation_alone_is_of_that_dtype(self, name):
        model = models.create(name, 10, "bfloat16", width=4)
        seen = {}

        def record(call, args, kwargs, context):
            out = call(*args, **kwargs)
            if isinstance(context.module, nn.Conv | nn.BatchNorm):
                seen["/".join(context.module.path)] = out.dtype
            return out

        def both(x):
            variables = model.init(jax.random.key(0), x, False)
            with nn.intercept_methods(record):
                return variables, model.apply(variables, x, True, mutable="batch_stats")

        variables, (logits, updates) = jax.eval_shape(both, jnp.zeros((2, 16, 16, 3)))
        self.assertEqual(set(seen.values()), {jnp.dtype("bfloat16")})
        self.assertEqual(logits.dtype, jnp.float32)
        for leaf in jax.tree.leaves((variables, updates)):
            self.assertEqual(leaf.dtype, jnp.float32)

    def test_it_rounds_and_no_more(self):
        x = _images(8)
        plain, half = (
            ResNet(10, (1,), width=4, dtype=dtype) for dtype in (None, jnp.bfloat16)
        )
        variables = _random(plain, x.shape)
        expected, actual = (
            jax.jit(lambda v, m=m: m.apply(v, x, False))(variables)
            for m in (plain, half)
        )
        error = jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected)
        self.assertBetween(float(error), 1e-5, 0.03)


if __name__ == "__main__":
    absltest.main()
