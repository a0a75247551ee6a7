import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

import dropit_jax
from dropit_jax import DropIT, memory
from train import models
from train.models import layers
from train.models.resnet import BottleneckBlock, ResNet
from train.models.vit import ViT

_X = jnp.zeros((2, 8, 8, 3))
_POLICY = DropIT(rate=0.75, fill="mean")


def _resnet(**fields):
    return ResNet(10, (1, 1), width=4, **fields)


def _vit(**fields):
    return ViT(10, 4, 8, num_layers=1, num_heads=2, **fields)


def _modules(model):
    """Each layer that a call of the model uses, by its path."""
    seen = {}

    def record(call, args, kwargs, context):
        seen["/".join(context.module.path)] = context.module
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(lambda: model.init(jax.random.key(0), _X, False))
    return seen


class CreateTest(parameterized.TestCase):
    def test_the_names_of_what_there_is(self):
        self.assertEqual(
            models.MODELS,
            (
                *("resnet18", "resnet34", "resnet50"),
                *("vit_mu", "vit_ti", "vit_s", "vit_b", "vit_l"),
            ),
        )
        self.assertEqual(models.STEMS, ("cifar", "imagenet"))
        self.assertEqual(models.POOLS, ("cls", "gap"))
        self.assertEqual(models.POSITIONS, ("learned", "sincos"))
        self.assertEqual(models.REMATS, ("none", "blocks", "dots"))

    @parameterized.parameters(*models.MODELS)
    def test_fields_are_those_of_the_class(self, name):
        expected = ("patch_size", "pool", "positions", "dropout", "drop_path", "scan")
        if name.startswith("resnet"):
            expected = ("width", "stem")
        self.assertEqual(models.fields(name), expected)

    def test_values_that_are_not_given_are_the_classes(self):
        self.assertEqual(models.create("resnet18", 10), ResNet(10))
        self.assertEqual(models.create("vit_b", 10), ViT(10))

    def test_values_are_handed_on(self):
        common = {"layers": layers.dropit(_POLICY), "remat": "dots"}
        model = models.create("resnet50", 10, width=4, stem="imagenet", **common)
        sizes = {"block": BottleneckBlock, "stage_sizes": (3, 4, 6, 3)}
        self.assertEqual(model, ResNet(10, width=4, stem="imagenet", **sizes, **common))
        values = {
            **{"patch_size": 8, "pool": "gap", "positions": "sincos"},
            **{"dropout": 0.1, "drop_path": 0.2, "scan": True},
        }
        model = models.create("vit_mu", 10, **values, **common)
        sizes = {"width": 32, "num_layers": 1, "num_heads": 2}
        self.assertEqual(model, ViT(10, **sizes, **values, **common))

    @parameterized.parameters("resnet34", "vit_ti")
    def test_dtype(self, name):
        plain = models.create(name, 10)
        self.assertIsNone(plain.dtype)
        self.assertEqual(models.create(name, 10, "float32"), plain)
        half = models.create(name, 10, "bfloat16")
        self.assertEqual(half.dtype, jnp.bfloat16)

    @parameterized.parameters("int32", "bfloat61")
    def test_other_dtypes_are_refused(self, dtype):
        with pytest.raises(ValueError, match=f"dtype: .*floating.*'{dtype}'"):
            models.create("vit_mu", 10, dtype)

    def test_other_names_and_fields_are_refused(self):
        with pytest.raises(ValueError, match=r"model: unknown value 'vit_x'.*vit_mu"):
            models.create("vit_x", 10)
        with pytest.raises(ValueError, match="model: unknown value 'vit_x'"):
            models.fields("vit_x")
        with pytest.raises(TypeError, match="vit_mu has no field 'stem'; it has pa"):
            models.create("vit_mu", 10, stem="cifar")
        # That the name says it, and it is no field, must not be overruled.
        with pytest.raises(TypeError, match="vit_mu has no field 'width'"):
            models.create("vit_mu", 10, width=64)


class FlaxLayersTest(parameterized.TestCase):
    @parameterized.parameters(
        (_resnet(),),
        (_resnet(block=BottleneckBlock),),
        (_vit(dropout=0.1, drop_path=0.1),),
    )
    def test_models_of_them_know_nothing_of_the_library(self, model):
        def classes():
            for module in _modules(model).values():
                yield from type(module).__mro__

        sources = {each.__module__.partition(".")[0] for each in classes()}
        self.assertEqual(sources, {"builtins", "flax", "train"})
        # Activation functions of the library have derivatives of their own.
        rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        program = jax.make_jaxpr(lambda x: model.init(rngs, x, True))(_X)
        self.assertNotIn("custom_vjp_call", str(program))


class DropITLayersTest(parameterized.TestCase):
    @parameterized.parameters(
        (_resnet, "stem_conv", {"conv1", "conv2", "shortcut_conv", "head"}),
        (
            lambda **fields: _resnet(block=BottleneckBlock, **fields),
            "stem_conv",
            {"conv1", "conv2", "conv3", "shortcut_conv", "head"},
        ),
        (
            _vit,
            "embedding",
            {"MultiHeadDotProductAttention_1", "Dense_0", "Dense_1", "head"},
        ),
    )
    def test_all_drop_but_the_one_that_reads_the_image(self, make, first, others):
        modules = _modules(make(layers=layers.dropit(_POLICY))).values()
        products = (nn.Conv, nn.Dense, nn.MultiHeadDotProductAttention)
        policies = {
            each.name: getattr(each, "dropit", None)
            for each in modules
            if isinstance(each, products)
        }
        self.assertIsNone(policies.pop(first))
        self.assertEqual(set(policies), others)
        # The head reads one vector a sample, of which there is no mean.
        head = policies.pop("head")
        self.assertEqual(head, dataclasses.replace(_POLICY, fill="zero"))
        self.assertEqual(set(policies.values()), {_POLICY})

    def test_a_relu_stores_a_bit_an_element(self):
        model = ResNet(10, (1,), width=4, layers=layers.dropit(_POLICY))
        variables = jax.eval_shape(lambda: model.init(jax.random.key(0), _X, False))

        def loss(variables):
            return model.apply(variables, _X, True, mutable=["batch_stats"])[0].sum()

        stored = memory.saved_residuals(loss, variables).by_kind
        # Of the stem and twice in the block: outputs of 2 x 8 x 8 x 4 elements.
        self.assertEqual(stored["relu"], 3 * (2 * 8 * 8 * 4) // 8)

    def test_are_equal_where_their_policies_are(self):
        # Or functions of models that are equal would be compiled twice.
        same = DropIT(0.75, fill="mean")
        self.assertEqual(layers.dropit(_POLICY), layers.dropit(same))
        self.assertNotEqual(layers.dropit(_POLICY), layers.dropit(DropIT()))
        self.assertIs(layers.dropit(_POLICY).relu, dropit_jax.nn.relu)


class RematTest(parameterized.TestCase):
    """What is recomputed is not stored."""

    @parameterized.parameters((_resnet,), (_vit,))
    def test_stores_the_less_the_more_is_recomputed(self, make):
        def stored(remat):
            model = make(remat=remat)
            variables = jax.eval_shape(lambda: model.init(jax.random.key(0), _X, False))

            def loss(variables):
                logits, _ = model.apply(variables, _X, True, mutable=["batch_stats"])
                return logits.sum()

            return memory.saved_residuals(loss, variables).total_bytes

        blocks, dots, none = (stored(remat) for remat in ("blocks", "dots", "none"))
        self.assertBetween(blocks, 1, 0.5 * dots)
        self.assertBetween(dots, 1, 0.9 * none)


if __name__ == "__main__":
    absltest.main()
