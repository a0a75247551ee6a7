import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

import dropit_jax.nn
from dropit_jax import DropIT, memory
from dropit_jax import linen as dn
from tests.dropit_jax import reference
from train import models
from train.models.resnet import ResNet


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
        dropped = ResNet(10, width=8, stem=stem, dropit=DropIT())
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

        model = ResNet(10, width=4, dropit=DropIT())
        with nn.intercept_methods(record):
            _variables(model, (1, 16, 16, 3))
        exempt = [name for name, dropit in seen.items() if dropit is None]
        self.assertEqual(exempt, ["stem_conv"])
        self.assertEqual(
            set(seen), {"stem_conv", "conv1", "conv2", "shortcut_conv", "head"}
        )

    def test_create_makes_it(self):
        model = models.create("resnet18", 10, width=4, stem="cifar", dropit=DropIT())
        self.assertEqual(model, ResNet(10, width=4, stem="cifar", dropit=DropIT()))


def _training_step(model):
    optimizer = optax.sgd(0.1, momentum=0.9)

    def step(variables, opt_state, images, labels):
        def loss_fn(params):
            logits, updates = model.apply(
                variables | {"params": params}, images, True, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updates

        gradients, updates = jax.grad(loss_fn, has_aux=True)(variables["params"])
        changes, opt_state = optimizer.update(gradients, opt_state)
        params = optax.apply_updates(variables["params"], changes)
        return {"params": params, **updates}, opt_state

    variables = _variables(model, (1, 32, 32, 3))
    return step, (
        variables,
        jax.eval_shape(optimizer.init, variables["params"]),
        jax.ShapeDtypeStruct((128, 32, 32, 3), jnp.float32),
        jax.ShapeDtypeStruct((128,), jnp.int32),
    )


class MemoryTest(parameterized.TestCase):
    def test_dropit_needs_at_most_0_65_of_the_memory_on_an_h100(self):
        # 32x32 images, batch 128, width 64, float32; the baseline has plain Flax layers
        # and `jax.nn.relu`.
        temp_bytes = []
        for policy in (None, DropIT(rate=0.875)):
            step, args = _training_step(ResNet(100, dropit=policy))
            report = memory.compile_report(step, *args, target="h100", donate=(0, 1))
            temp_bytes.append(report.temp_bytes)
        baseline, dropped = temp_bytes
        self.assertLessEqual(dropped, 0.65 * baseline)

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
