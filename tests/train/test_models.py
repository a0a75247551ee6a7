import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

import dropit_jax.nn
from dropit_jax import layer_preset
from dropit_jax import linen as dn
from train import models
from train.models.resnet import BottleneckBlock, ResNet
from train.models.vit import ViT


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

    @parameterized.parameters(*models.MODELS)
    def test_fields_are_those_of_the_class(self, name):
        expected = ("patch_size", "pool", "positions", "dropout", "drop_path", "scan")
        if name.startswith("resnet"):
            expected = ("width", "stem")
        self.assertEqual(models.fields(name), expected)

    def test_values_that_are_not_given_are_the_classes(self):
        memory = layer_preset("dropit")
        self.assertEqual(
            models.create("resnet18", 10, memory), ResNet(10, memory=memory)
        )
        self.assertEqual(models.create("vit_b", 10, memory), ViT(10, memory=memory))

    def test_values_are_handed_on(self):
        memory = layer_preset("lean")
        model = models.create("resnet50", 10, memory, width=4, stem="imagenet")
        sizes = {"block": BottleneckBlock, "stage_sizes": (3, 4, 6, 3)}
        self.assertEqual(
            model, ResNet(10, width=4, stem="imagenet", memory=memory, **sizes)
        )
        values = {
            **{"patch_size": 8, "pool": "gap", "positions": "sincos"},
            **{"dropout": 0.1, "drop_path": 0.2, "scan": True},
        }
        model = models.create("vit_mu", 10, memory, **values)
        sizes = {"width": 32, "num_layers": 1, "num_heads": 2}
        self.assertEqual(model, ViT(10, memory=memory, **sizes, **values))

    @parameterized.parameters("resnet34", "vit_ti")
    def test_dtype(self, name):
        memory = layer_preset("baseline")
        plain = models.create(name, 10, memory)
        self.assertIsNone(plain.dtype)
        self.assertEqual(models.create(name, 10, memory, "float32"), plain)
        half = models.create(name, 10, memory, "bfloat16")
        self.assertEqual(half.dtype, jnp.bfloat16)

    @parameterized.parameters("int32", "bfloat61")
    def test_other_dtypes_are_refused(self, dtype):
        with pytest.raises(ValueError, match=f"dtype: .*floating.*'{dtype}'"):
            models.create("vit_mu", 10, layer_preset("baseline"), dtype)

    def test_other_names_and_fields_are_refused(self):
        with pytest.raises(ValueError, match=r"model: unknown value 'vit_x'.*vit_mu"):
            models.create("vit_x", 10, layer_preset("baseline"))
        with pytest.raises(ValueError, match="model: unknown value 'vit_x'"):
            models.fields("vit_x")
        with pytest.raises(TypeError, match="vit_mu has no field 'stem'; it has pa"):
            models.create("vit_mu", 10, layer_preset("baseline"), stem="cifar")
        # That the name says it, and it is no field, must not be overruled.
        with pytest.raises(TypeError, match="vit_mu has no field 'width'"):
            models.create("vit_mu", 10, layer_preset("baseline"), width=64)


class PlainTest(parameterized.TestCase):
    @parameterized.parameters(
        (ResNet(10, width=4),),
        (ResNet(10, (1, 1), width=4, block=BottleneckBlock),),
        (ViT(10, 4, 16, num_layers=1, num_heads=2, dropout=0.1, drop_path=0.1),),
    )
    def test_the_baseline_is_plain_flax(self, model):
        seen = set()

        def record(call, args, kwargs, context):
            seen.add((context.module.name, getattr(context.module, "dropit", None)))
            return call(*args, **kwargs)

        rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        with nn.intercept_methods(record):
            text = str(
                jax.make_jaxpr(lambda x: model.init(rngs, x, True))(
                    jnp.zeros((1, 16, 16, 3))
                )
            )
        self.assertEqual({dropit for _, dropit in seen}, {None})
        self.assertNotIn(dropit_jax.nn.relu.__name__ + "_backward", text)
        # `nn.gelu` and `nn.relu` of the baseline are Flax's.
        self.assertNotIn("custom_vjp_call", text)
        self.assertTrue(issubclass(dn.Conv, nn.Conv))


class HeadTest(parameterized.TestCase):
    """A head reads one vector a sample, of which there is no mean."""

    @parameterized.parameters(
        (ResNet(10, (1,), width=4, stem="cifar"),),
        (ViT(10, 4, 16, num_layers=1, num_heads=2),),
    )
    def test_a_model_is_filled_with_means_but_for_its_head(self, model):
        memory = layer_preset("dropit", rate=0.75, fill="mean", value_dtype=None)
        images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
        variables = model.init(jax.random.key(0), images, False)
        # A head of zeros would hand no gradient on.
        variables = jax.tree.map(lambda leaf: leaf + 0.1, variables)

        def loss(params, model):
            state = {name: x for name, x in variables.items() if name != "params"}
            logits = model.apply({"params": params, **state}, images, False)
            return jnp.sum(jnp.sin(logits + jnp.arange(10)))

        gradients = {
            fill: jax.grad(loss)(
                variables["params"],
                model.clone(
                    memory=dataclasses.replace(
                        memory,
                        dropit=dataclasses.replace(memory.dropit, fill=fill),
                        conv=dataclasses.replace(memory.conv, fill=fill),
                    )
                ),
            )
            for fill in ("zero", "mean")
        }
        differ = {
            jax.tree_util.keystr(path[:-1], simple=True, separator="/")
            for (path, zero), mean in zip(
                jax.tree_util.tree_leaves_with_path(gradients["zero"]),
                jax.tree.leaves(gradients["mean"]),
                strict=True,
            )
            if not bool(jnp.array_equal(zero, mean))
        }
        self.assertNotIn("head", differ)
        self.assertGreater(len(differ), 1)


if __name__ == "__main__":
    absltest.main()
