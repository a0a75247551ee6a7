"""Models of others, as they were published."""

import functools
import re

import chex
import flax
import jax
import jax.numpy as jnp
import jax_resnet
import numpy as np
import optax
import pytest
from absl.testing import absltest, parameterized
from jax.interpreters import partial_eval as pe
from transformer_in_transformer_flax import TNTConfig, TransformerInTransformer

from dropit_jax import DropIT, memory
from dropit_jax import linen as dn
from tests.dropit_jax import reference

# What the transformer is made of; Flax has announced the end of it.
pytestmark = pytest.mark.filterwarnings("ignore:SelfAttention will be deprecated")

_CLASSES = 4
_RATE = 0.1  # of learning


def _resnet():
    """Stem, one block, and head."""
    return jax_resnet.ResNet(
        jax_resnet.ResNetBlock,
        stage_sizes=[1],
        hidden_sizes=(8,),
        n_classes=_CLASSES,
    )


def _transformer():
    config = TNTConfig(
        num_classes=_CLASSES,
        depth=2,
        image_size=16,
        patch_size=4,
        transformed_patch_size=2,
        inner_dim=8,
        inner_heads=2,
        inner_dim_head=4,
        inner_r=2,
        outer_dim=16,
        outer_heads=2,
        outer_dim_head=8,
        outer_r=2,
    )
    return TransformerInTransformer(config)


# The first layer, and how many others there are: in a ResNet's block two convolutions
# and that of the skip connection; in a transformer's two attentions of four, two MLPs
# of two and the projection from the inner to the outer one.
_RESNET = (_resnet, "layers_0/ConvBlock_0/Conv_0", 3 + 1)
_TRANSFORMER = (_transformer, "Conv_0", 1 + 2 * (2 * 4 + 2 * 2 + 1) + 1)


def _batch():
    """Images that are lit in one of four corners, their classes."""
    rng = np.random.default_rng(0)
    labels = np.arange(8) % _CLASSES
    images = rng.normal(size=(8, 16, 16, 3))
    for image, label in zip(images, labels, strict=True):
        image[8 * (label // 2) :][:8, 8 * (label % 2) :][:, :8] += 2
    return jnp.asarray(images, jnp.float32), jnp.asarray(labels)


def _init(model, images):
    return model.init(jax.random.key(0), images)


def _start(model, images):
    """Variables of an initialisation's types, which need not be compiled."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        if path[-1].key == "kernel":
            inputs = np.prod(leaf.shape[:-1])
            return jnp.asarray(rng.normal(size=leaf.shape) / inputs**0.5, leaf.dtype)
        return jnp.full(leaf.shape, path[-1].key in ("scale", "var"), leaf.dtype)

    shapes = jax.eval_shape(functools.partial(_init, model), images)
    return jax.tree_util.tree_map_with_path(draw, shapes)


def _initialisation(model, images):
    """The program that draws the variables, and their structure."""
    program, variables = jax.make_jaxpr(
        functools.partial(_init, model), return_shape=True
    )(images)
    jaxpr = program.jaxpr
    drawn, _ = pe.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    return str(drawn), program.consts, variables


def _step(model, batch, variables):
    """Other variables, and loss, logits and gradients before."""
    images, labels = batch
    params = variables["params"]
    state = {name: value for name, value in variables.items() if name != "params"}

    def loss(params):
        logits, updates = model.apply(
            {"params": params, **state}, images, mutable=list(state)
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), (logits, updates)

    (value, (logits, updates)), gradients = jax.value_and_grad(loss, has_aux=True)(
        params
    )
    params = jax.tree.map(lambda p, g: p - _RATE * g, params, gradients)
    return {"params": params, **updates}, value, logits, gradients


class ThirdPartyTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("resnet", *_RESNET), ("transformer", *_TRANSFORMER)
    )
    def test_trains_as_published(self, make, first, others):
        model, batch = make(), _batch()
        program = functools.partial(_step, model, batch)
        step = jax.jit(program)
        initialisation = _initialisation(model, batch[0])
        start = _start(model, batch[0])
        step.trace(start)
        plain, exact = self._plain_and_exact(program, start, others)
        _, plain_loss, plain_logits, plain_gradients = plain
        chex.assert_trees_all_close(exact, plain_gradients, rtol=1e-4, atol=1e-5)

        # The very same functions: they are traced again.
        with dn.intercept(DropIT(0.75)) as report:
            self.assertEqual(_initialisation(model, batch[0]), initialisation)
            cached = memory.cached_bytes(program, start)
            variables, loss, logits, gradients = step(start)
            reference.assert_same_bits(logits, plain_logits)
            reference.assert_same_bits(loss, plain_loss)
            losses = [loss]
            for _ in range(3):
                variables, loss, *others_of_step = step(variables)
                chex.assert_tree_all_finite((variables, *others_of_step))
                losses.append(loss)
        self.assertLess(losses[-1], 0.9 * losses[0])
        chex.assert_trees_all_equal_shapes_and_dtypes(variables, start)

        paths = {layer.path for layer in report.layers}
        self.assertLen(paths, others)
        self.assertNotIn(first, paths)
        # A quarter, and a bit for each element.
        self.assertLess(report.bytes_after, 0.3 * report.bytes_before)
        # The same by definition, where no layer is called twice or in a loop, but for
        # layers that nothing reads the result of: the transformer's last inner ones.
        unread = [
            layer.bytes_after
            for layer in report.layers
            if re.match(r"Encoder_0/TNTBlock_1/(SelfAttention|MlpBlock)_0/", layer.path)
        ]
        self.assertEqual(cached, report.bytes_after - sum(unread))

        changed, reached = _kernels(gradients, plain_gradients)
        self.assertEqual(changed, paths & reached)
        self.assertIn(first, reached)

    def _plain_and_exact(self, program, start, others):
        """Returns the results of a step, and its gradients at rate zero."""

        @jax.jit
        def both(variables):
            plain = program(variables)
            with dn.intercept(DropIT(0.0)) as report:
                *_, exact = program(variables)
            self.assertLen(report.layers, others)
            return plain, exact

        return both(start)


def _kernels(actual, expected):
    """The layers with another kernel's gradient, and those with any but zero."""
    changed, reached = set(), set()
    actual = flax.traverse_util.flatten_dict(actual, sep="/")
    for path, gradient in flax.traverse_util.flatten_dict(expected, sep="/").items():
        if path.endswith("/kernel") and (norm := np.linalg.norm(gradient)) > 0:
            reached.add(path.removesuffix("/kernel"))
            if np.linalg.norm(np.subtract(actual[path], gradient)) > 1e-3 * norm:
                changed.add(path.removesuffix("/kernel"))
    return changed, reached


if __name__ == "__main__":
    absltest.main()
