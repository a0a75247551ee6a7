import copy
import functools
import pickle

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest, parameterized
from attnax import VisionTransformer
from attnax.config import VisionTransformerConfig
from flax import nnx

from dropit_jax import DropIT
from dropit_jax import nnx as dn
from tests.dropit_jax import reference
from tests.dropit_jax.nnx import nnx_runs as runs

_POLICY = DropIT(0.5)
_RANDOM = DropIT(0.5, strategy="random")


class Scaled(nnx.Linear):
    def __call__(self, x, scale=0.5):
        return scale * super().__call__(jnp.tanh(x))


def _converted():
    layer = Scaled(16, 16, rngs=nnx.Rngs(0))
    dn.apply(layer, _POLICY)
    return type(layer)


class _OfConverted(_converted()):
    pass


class Rectified(nnx.ConvTranspose):
    def __call__(self, x):
        return nnx.relu(super().__call__(x))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
        self.mlp = nnx.Sequential(nnx.Linear(16, 16, rngs=rngs), nnx.gelu)

    def __call__(self, x):
        return x + self.mlp(self.attention(x))


class Network(nnx.Module):
    """Layers in all the places where a model may have them."""

    def __init__(self, rngs):
        # The first in the model is not the first of its attributes.
        self.heads = nnx.data({"scaled": Scaled(16, 16, rngs=rngs)})
        self.lora = nnx.LoRALinear(16, 4, lora_rank=2, rngs=rngs)
        self.blocks = nnx.List([Block(rngs)])
        self.stem = nnx.Conv(16, 16, (3,), rngs=rngs)
        self.up = Rectified(16, 16, (3,), rngs=rngs)
        self.shared = self.stem

    def __call__(self, x):
        x = self.up(self.shared(x))
        for block in self.blocks:
            x = block(x)
        return self.lora(self.heads["scaled"](x=x, scale=2.0))


_PROJECTIONS = [f"blocks/0/attention/{n}" for n in ("query", "key", "value", "out")]
_KINDS = {
    "heads/scaled": "Scaled",
    "lora": "LoRALinear",
    **dict.fromkeys(_PROJECTIONS, "LinearGeneral"),
    "blocks/0/mlp/layers/0": "Linear",
    "stem": "Conv",
    "up": "Rectified",
}


def _paths(changes):
    return [change.path for change in changes]


def _policies(model):
    return {getattr(node, "dropit", None) for _, node in nnx.iter_graph(model)}


def _variables(model):
    return [v for _, v in nnx.iter_graph(model) if isinstance(v, nnx.Variable)]


class ApplyTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.model = Network(nnx.Rngs(0))
        self.x = runs.numbers(2, 6, 16)

    def _loss(self, model):
        return jnp.mean((model(self.x) - 1) ** 2)

    def test_converts_every_layer_and_takes_it_back(self):
        (expected,) = runs.run([self.model], self.x)
        variables = _variables(self.model)
        self.assertEqual(
            dn.apply(self.model, _POLICY),
            [dn.Change(path, kind, None, _POLICY) for path, kind in _KINDS.items()],
        )
        (actual,) = runs.run([self.model], self.x)
        chex.assert_trees_all_close(actual[::2], expected[::2], rtol=1e-5, atol=1e-5)
        equal = functools.partial(np.allclose, rtol=1e-4, atol=1e-4)
        exact = jax.tree.map(equal, actual[1], expected[1])
        for path, is_exact in jax.tree.leaves_with_path(exact):
            self.assertEqual(is_exact, "kernel" not in str(path[-1]), path)

        self.assertEqual(
            dn.apply(self.model, None),
            [dn.Change(path, kind, _POLICY, None) for path, kind in _KINDS.items()],
        )
        chex.assert_trees_all_equal(runs.run([self.model], self.x), [expected])
        for before, after in zip(variables, _variables(self.model), strict=True):
            self.assertIs(before, after)

    @parameterized.parameters(Scaled, nnx.LoRALinear, Rectified)
    def test_a_subclass_computes_what_it_did(self, cls):
        options = {"lora_rank": 2} if cls is nnx.LoRALinear else {}
        arguments = (16, 4, (3,)) if cls is Rectified else (16, 4)
        layer = cls(*arguments, **options, rngs=nnx.Rngs(0))
        expected = layer(self.x)
        self.assertEqual(_paths(dn.apply(layer, _POLICY)), [""])
        self.assertIsInstance(layer, cls)
        reference.assert_same_bits(layer(self.x), expected)
        self.assertEqual(
            runs.cached_bytes(layer, self.x), runs.residual_bytes(self.x.shape)
        )

    @parameterized.parameters(
        ({"only": "blocks/*"}, [*_PROJECTIONS, "blocks/0/mlp/layers/0"]),
        ({"only": ("*/key", "up", "st?m")}, [_PROJECTIONS[1], "stem", "up"]),
        ({"exclude": ["blocks/*", "lora"]}, ["heads/scaled", "stem", "up"]),
        ({"only": "blocks/*", "exclude": "*/attention/*"}, ["blocks/0/mlp/layers/0"]),
    )
    def test_globs(self, globs, expected):
        self.assertEqual(_paths(dn.apply(self.model, _POLICY, **globs)), expected)

    def test_the_first_layer_that_is_reached_may_be_left_alone(self):
        variables = _variables(self.model)
        changes = dn.apply(self.model, _POLICY, skip_first=lambda m: m(self.x))
        self.assertEqual(_paths(changes), [path for path in _KINDS if path != "stem"])
        self.assertIs(type(self.model.stem), nnx.Conv)
        self.assertEqual(
            list(map(id, variables)), list(map(id, _variables(self.model)))
        )

    @parameterized.parameters(
        (_POLICY, {"only": ["up", "convs/*"]}, ValueError, "matches 'convs/\\*'"),
        (_POLICY, {"exclude": "dense"}, ValueError, "matches 'dense'"),
        (_POLICY, {"only": []}, ValueError, "only"),
        (_RANDOM, {}, ValueError, "needs PRNG keys"),
        (_RANDOM, {"rngs": nnx.Rngs(params=0)}, ValueError, "needs PRNG keys"),
        (0.5, {}, TypeError, r"got 0\.5"),
        (_POLICY, {"only": 3}, TypeError, "only.* 3"),
        (_POLICY, {"exclude": ["up", 3]}, TypeError, "exclude.* 3"),
        (_POLICY, {"skip_first": True}, TypeError, "skip_first.* True"),
    )
    def test_what_is_refused_changes_nothing(self, policy, options, error, message):
        with pytest.raises(error, match=message):
            dn.apply(self.model, policy, **options)
        self.assertEqual(_policies(self.model), {None})
        self.assertIs(type(self.model.stem), nnx.Conv)

    def test_only_a_model_of_nnx_is_taken(self):
        with pytest.raises(TypeError, match="Dense"):
            dn.apply(nn.Dense(4), _POLICY)

    def test_layers_with_a_policy_are_left_alone(self):
        own = DropIT(0.9)
        self.model.up = dn.ConvTranspose(16, 16, (3,), dropit=own, rngs=nnx.Rngs(0))
        changes = dn.apply(self.model, _POLICY)
        self.assertEqual(_paths(changes), [path for path in _KINDS if path != "up"])
        self.assertEqual(self.model.up.dropit, own)
        self.assertEqual(dn.apply(self.model, _POLICY), [])
        taken_back = dn.apply(self.model, None, only="up")
        self.assertEqual(taken_back, [dn.Change("up", "ConvTranspose", own, None)])

    def test_a_layer_may_get_one_policy_after_another(self):
        layers = nnx.List([dn.Linear(16, 4, rngs=nnx.Rngs(0)), self.model.lora])
        for policy in (_POLICY, _RANDOM, _POLICY):
            changes = dn.apply(layers, policy, rngs=nnx.Rngs(0))
            self.assertEqual(_paths(changes), ["0", "1"])
            self.assertEqual(
                runs.cached_bytes(layers[0], self.x), runs.residual_bytes(self.x.shape)
            )
            dn.apply(layers, None)
        self.assertEqual(runs.cached_bytes(layers[0], self.x), 0)

    def test_each_call_of_a_random_strategy_drops_other_elements(self):
        layer = nnx.Linear(64, 3, rngs=nnx.Rngs(0))
        dn.apply(layer, _RANDOM, rngs=nnx.Rngs(dropit=1))
        gradient = nnx.jit(lambda m, x: nnx.grad(lambda m: m(x).sum())(m))
        x = runs.numbers(1, 64) + 10
        # Of one sample and a sum, it is the sparse input itself.
        kept = [gradient(layer, x)["kernel"][...][:, 0] for _ in range(2)]
        for sparse in kept:
            chex.assert_trees_all_equal(sparse, jnp.where(sparse == 0, 0, x[0]))
            counts = np.count_nonzero(sparse.reshape(4, 16), axis=1)
            np.testing.assert_array_equal(counts, 8)
        self.assertFalse(bool((kept[0] == kept[1]).all()))

    def test_a_policy_survives_split_and_merge(self):
        dn.apply(self.model, _POLICY, only="up")
        dn.apply(self.model, _RANDOM, rngs=nnx.Rngs(0), exclude="up")
        copy = nnx.merge(*nnx.split(self.model))
        self.assertEqual(copy.up.dropit, _POLICY)
        self.assertEqual(copy.blocks[0].attention.key.dropit, _RANDOM)
        # One stream for all, so that they can share what they cache.
        self.assertIs(copy.stem.dropit_rngs, copy.lora.dropit_rngs)
        original, copied = runs.run([self.model.stem, copy.stem], self.x)
        chex.assert_trees_all_equal(copied, original)
        self.assertEqual(
            runs.cached_bytes(copy, self.x), runs.cached_bytes(self.model, self.x)
        )

    @parameterized.parameters(
        (lambda rngs: nnx.Linear(64, 3, use_bias=False, rngs=rngs), (3,)),
        (lambda rngs: nnx.Linear(64, 3, use_bias=False, rngs=rngs), (2, 2)),
        (
            lambda rngs: nnx.LinearGeneral((64,), (3, 1), use_bias=False, rngs=rngs),
            (2, 2),
        ),
        (lambda rngs: nnx.Einsum("...i,io->...o", (64, 3), rngs=rngs), (3,)),
        (lambda rngs: nnx.Conv(64, 3, (1,), use_bias=False, rngs=rngs), (2, 2)),
        (lambda rngs: nnx.ConvTranspose(64, 3, (1,), use_bias=False, rngs=rngs), (3,)),
    )
    def test_stacked_layers_drop_elements_of_their_own(self, make, sizes):
        for size in sizes:
            make = nnx.split_rngs(splits=size)(nnx.vmap(make))
        stacked = make(nnx.Rngs(0))
        dn.apply(stacked, _RANDOM, rngs=nnx.Rngs(dropit=1))
        x = runs.numbers(1, 1, 64) + 10

        def call(layer, x):
            return layer(x)

        for _ in sizes:
            call = nnx.vmap(call, in_axes=(0, None))
        gradient = nnx.jit(nnx.grad(lambda layer: call(layer, x).sum()))(stacked)
        # Of one sample and a sum, it is the sparse input itself.
        sparse = gradient["kernel"][...].reshape(*sizes, 64, 3)[..., 0]
        chex.assert_trees_all_equal(sparse, jnp.where(sparse == 0, 0, x[0, 0]))
        rows = np.asarray(sparse).reshape(-1, 4, 16)
        np.testing.assert_array_equal(np.count_nonzero(rows, axis=2), 8)
        self.assertLen(np.unique(rows, axis=0), len(rows))

    def test_layers_may_be_stacked_along_any_axis(self):
        axes = nnx.StateAxes({nnx.Param: 1, ...: 0})
        make = nnx.vmap(
            lambda rngs: nnx.Linear(16, 16, use_bias=False, rngs=rngs), out_axes=axes
        )
        stacked = nnx.split_rngs(splits=3)(make)(nnx.Rngs(0))
        dn.apply(stacked, _RANDOM, rngs=nnx.Rngs(dropit=1))
        self.assertEqual(stacked.dropit_rngs.key.shape, (3,))

        def call(stacked):
            scan = nnx.scan(
                lambda x, layer: layer(x), in_axes=(nnx.Carry, axes), out_axes=nnx.Carry
            )
            return jnp.sum(scan(self.x, stacked))

        gradient = nnx.jit(nnx.grad(call))(stacked)
        self.assertEqual(gradient.kernel.shape, (16, 3, 16))

    def test_stacks_of_one_size_may_be_taken_apart_along_other_axes(self):
        make = nnx.split_rngs(splits=3)(nnx.vmap(Block))
        model = nnx.Dict(one=make(nnx.Rngs(0)), other=make(nnx.Rngs(1)))
        dn.apply(model, _RANDOM, rngs=nnx.Rngs(dropit=1))

        def call(one, other, x):
            scan = nnx.scan(
                lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
            )
            return scan(one(x), other)

        many = nnx.jit(nnx.vmap(call, in_axes=(0, None, None)))
        out = many(model.one, model.other, self.x)
        self.assertEqual(out.shape, (3, *self.x.shape))

    def test_stacked_layers_in_a_scan(self):
        make = nnx.split_rngs(splits=3)(nnx.vmap(Block))
        model = nnx.Dict(stem=nnx.Linear(16, 16, rngs=nnx.Rngs(0)))
        model.blocks = make(nnx.Rngs(1))
        dn.apply(model, _RANDOM, rngs=nnx.Rngs(dropit=1))

        @nnx.jit
        @nnx.grad
        def gradient(model, x):
            scan = nnx.scan(
                lambda x, block: block(x),
                in_axes=(nnx.Carry, 0),
                out_axes=nnx.Carry,
            )
            return jnp.sum(scan(model.stem(x), model.blocks) ** 2)

        first, second = (gradient(model, self.x) for _ in range(2))
        kernel = first.blocks.mlp.layers[0].kernel[...]
        self.assertEqual(kernel.shape, (3, 16, 16))
        other = second.blocks.mlp.layers[0].kernel[...]
        self.assertFalse(bool((kernel == other).all(axis=(1, 2)).any()))

    @parameterized.parameters(
        lambda model: pickle.loads(pickle.dumps(model)),
        copy.deepcopy,
        lambda model: nnx.merge(*pickle.loads(pickle.dumps(nnx.split(model)))),
    )
    def test_a_converted_model_can_be_copied(self, copied):
        model = Network(nnx.Rngs(0))
        dn.apply(model, _POLICY)
        other = copied(model)
        self.assertIs(type(other.lora), type(model.lora))
        self.assertIs(type(other.up), type(model.up))
        x = jnp.ones((2, 4, 16))
        np.testing.assert_array_equal(other(x), model(x))

    def test_a_class_made_of_a_converted_one_is_pickled_by_its_name(self):
        self.assertIs(pickle.loads(pickle.dumps(_OfConverted)), _OfConverted)

    def test_training(self):
        dn.apply(self.model, _RANDOM, rngs=nnx.Rngs(0))
        losses = runs.train(self.model, self._loss, steps=6)
        self.assertLess(losses[-1], 0.5 * losses[0])

    def test_flaxs_scan_and_remat(self):
        @nnx.vmap(in_axes=0)
        def stack(rngs):
            return nnx.Linear(16, 16, rngs=rngs)

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def through(layer, x):
            return nnx.tanh(layer(x))

        gradient = nnx.jit(nnx.grad(lambda layers: through(layers, self.x).sum()))
        layers = stack(nnx.Rngs(0).split(3))
        expected = gradient(layers)
        dn.apply(layers, DropIT(0.0))
        chex.assert_trees_all_close(gradient(layers), expected, rtol=1e-5, atol=1e-5)
        dn.apply(layers, None)
        dn.apply(layers, _POLICY)
        actual = gradient(layers)["kernel"][...]
        self.assertFalse(np.array_equal(actual, expected["kernel"][...]))


_TINY = {"image_size": 8, "patch_size": 4, "num_classes": 4}
_TINY |= {"d_model": 16, "d_ff": 16, "num_heads": 2, "num_layers": 1}


class ThirdPartyTest(absltest.TestCase):
    def test_a_vision_transformer_of_attnax(self):
        config = VisionTransformerConfig(**_TINY)
        model = VisionTransformer(nnx.Rngs(0), config)
        images, labels = runs.numbers(6, 8, 8, 3), jnp.arange(6) % 4
        call = nnx.jit(lambda model: model(images, deterministic=True))
        expected = call(model)
        changes = dn.apply(model, DropIT(0.75), skip_first=call)
        names = [f"self_attn/{n}_proj" for n in ("query", "key", "value", "output")]
        names += ["ffn/dense1", "ffn/dense2"]
        paths = [f"layers/0/{name}" for name in names]
        # `nnx.jit` sorts the attributes of a model.
        self.assertCountEqual(_paths(changes), [*paths, "head"])
        reference.assert_same_bits(call(model), expected)
        self.assertGreater(runs.cached_bytes(model, images), 0)

        def loss(model):
            logits = model(images, deterministic=True)
            cross_entropy = optax.softmax_cross_entropy_with_integer_labels
            return cross_entropy(logits, labels).mean()

        losses = runs.train(model, loss, steps=15)
        self.assertLess(losses[-1], 0.7 * losses[0])


if __name__ == "__main__":
    absltest.main()
