import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import dropit_jax.nn
from dropit_jax import linen as dn
from dropit_jax import preset
from tests.dropit_jax import reference
from train import models
from train.models.resnet import ResNet
from train.models.vit import ViT


def _variables(model, shape):
    return jax.eval_shape(
        lambda x: model.init(jax.random.key(0), x, False), jnp.zeros(shape)
    )


def _count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


class ResNet18Test(parameterized.TestCase):
    def test_has_the_published_number_of_parameters(self):
        # torchvision's resnet18 has 11,689,512.
        model = ResNet(1000, stem="imagenet")
        params = _variables(model, (1, 224, 224, 3))["params"]
        self.assertEqual(_count(params), 11_689_512)

    def test_cifars_stem_differs_in_the_first_kernel_alone(self):
        params = {
            stem: _variables(ResNet(1000, stem=stem), (1, 64, 64, 3))["params"]
            for stem in ("cifar", "imagenet")
        }
        self.assertEqual(
            _count(params["imagenet"]) - _count(params["cifar"]), (49 - 9) * 3 * 64
        )

    @parameterized.parameters(("cifar", 32, (4, 4)), ("imagenet", 64, (2, 2)))
    def test_downsamples_as_published(self, stem, size, final):
        model = ResNet(10, width=4, stem=stem)
        _, state = jax.eval_shape(
            lambda x: model.init_with_output(
                jax.random.key(0), x, False, capture_intermediates=True
            ),
            jnp.zeros((2, size, size, 3)),
        )
        last = state["intermediates"]["stage4_block2"]["__call__"][0]
        self.assertEqual(last.shape, (2, *final, 32))

    @parameterized.parameters("cifar", "imagenet")
    def test_dropit_changes_neither_parameters_nor_output(self, stem):
        x = jnp.asarray(
            np.random.default_rng(0).normal(size=(2, 32, 32, 3)), jnp.float32
        )
        plain = ResNet(10, width=8, stem=stem)
        dropped = ResNet(10, width=8, stem=stem, memory=preset("dropit"))
        variables = jax.jit(lambda: plain.init(jax.random.key(0), x, False))()
        chex.assert_trees_all_equal_shapes_and_dtypes(
            variables, _variables(dropped, x.shape)
        )
        outputs = [
            jax.jit(lambda v, m=m: m.apply(v, x, False))(variables)
            for m in (plain, dropped)
        ]
        reference.assert_same_bits(*outputs)

    def test_all_layers_drop_but_the_first_convolution(self):
        seen = {}

        def record(call, args, kwargs, context):
            if isinstance(context.module, nn.Conv | nn.Dense):
                seen[context.module.name] = getattr(context.module, "dropit", None)
            return call(*args, **kwargs)

        model = ResNet(10, width=4, memory=preset("dropit"))
        with nn.intercept_methods(record):
            _variables(model, (1, 16, 16, 3))
        exempt = [name for name, dropit in seen.items() if dropit is None]
        self.assertEqual(exempt, ["stem_conv"])
        self.assertEqual(
            set(seen), {"stem_conv", "conv1", "conv2", "shortcut_conv", "head"}
        )

    def test_create_makes_it(self):
        memory = preset("dropit")
        model = models.create("resnet18", 10, memory, width=4, stem="cifar")
        self.assertEqual(model, ResNet(10, width=4, stem="cifar", memory=memory))


class ViTTest(parameterized.TestCase):
    def test_has_the_published_number_of_parameters(self):
        # Dosovitskiy et al., 2021, Table 1: 86 M and 307 M. To the last one as in
        # Google's implementation, whose ViT-B/16 has 86,567,656 for 1000 classes.
        shape = (1, 224, 224, 3)
        counts = {
            name: _count(
                _variables(
                    models.create(name, 1000, preset("baseline"), patch_size=16), shape
                )["params"]
            )
            for name in ("vit_b", "vit_l")
        }
        self.assertEqual(counts["vit_b"], 86_567_656)
        self.assertEqual(round(counts["vit_l"] / 1e6), 304)

    def test_parameters_have_the_names_of_googles_checkpoints(self):
        params = _variables(_tiny_vit("baseline"), (1, 8, 8, 3))["params"]
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

    def test_its_tokens_are_the_patches(self):
        # The embedding by hand, with one layer's worth of nothing else.
        model = _tiny_vit("baseline")
        x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)
        variables = model.init(jax.random.key(0), x, False)
        _, state = model.apply(variables, x, False, capture_intermediates=True)
        tokens = state["intermediates"]["Transformer"]["posembed_input"]["__call__"][0]
        embedding = variables["params"]["embedding"]
        patches = x.reshape(2, 2, 4, 2, 4, 3).transpose(0, 1, 3, 2, 4, 5)
        expected = patches.reshape(2, 4, 48) @ embedding["kernel"].reshape(48, 16)
        position = variables["params"]["Transformer"]["posembed_input"]["pos_embedding"]
        np.testing.assert_allclose(
            tokens[:, 1:],
            expected + embedding["bias"] + position[:, 1:],
            rtol=1e-4,
            atol=1e-5,
        )

    @parameterized.product(
        name=("dropit", "lean"), remat=("none", "blocks"), dtype=(None, "bfloat16")
    )
    def test_presets_change_neither_parameters_nor_output(self, name, remat, dtype):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)
        plain = _tiny_vit("baseline", dtype=dtype)
        other = _tiny_vit(name, remat, dtype=dtype)
        variables = jax.jit(lambda: plain.init(jax.random.key(0), x, False))()
        # The head starts at 0, and would hide what comes before it.
        variables["params"]["head"]["kernel"] += 1.0
        chex.assert_trees_all_equal_shapes_and_dtypes(
            variables, _variables(other, x.shape)
        )
        outputs = [
            jax.jit(lambda v, m=m: m.apply(v, x, False))(variables)
            for m in (plain, other)
        ]
        reference.assert_same_bits(*outputs)


def _tiny_vit(name, remat="none", dtype=None):
    sizes = {"patch_size": 4, "width": 16, "num_layers": 2, "num_heads": 2}
    return ViT(10, dtype=dtype, memory=preset(name, remat=remat), **sizes)


class PlainTest(parameterized.TestCase):
    def test_the_baseline_is_plain_flax(self):
        seen = set()

        def record(call, args, kwargs, context):
            seen.add((context.module.name, getattr(context.module, "dropit", None)))
            return call(*args, **kwargs)

        model = ResNet(10, width=4)
        with nn.intercept_methods(record):
            text = str(
                jax.make_jaxpr(lambda x: model.init(jax.random.key(0), x, True))(
                    jnp.zeros((1, 16, 16, 3))
                )
            )
        self.assertEqual({dropit for _, dropit in seen}, {None})
        self.assertNotIn(dropit_jax.nn.relu.__name__ + "_backward", text)
        self.assertNotIn("custom_vjp_call", text)
        self.assertTrue(issubclass(dn.Conv, nn.Conv))


if __name__ == "__main__":
    absltest.main()
