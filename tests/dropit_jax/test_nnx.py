import functools

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
from jax import lax

from dropit_jax import DropIT, memory
from dropit_jax import nnx as dn
from tests.dropit_jax import reference

_POLICY = DropIT(0.5)
_RANDOM = DropIT(0.5, strategy="random")

_HALF = {"dtype": jnp.bfloat16}
_HALF_PARAMS = {"param_dtype": jnp.bfloat16}
_FULL = {"precision": lax.Precision.HIGHEST}
_FLOAT_OUT = {"preferred_element_type": jnp.float32}
_MASK = {"mask": jnp.broadcast_to(jnp.eye(3)[..., None, None], (3, 3, 16, 8))}
_GROUPS = {"feature_group_count": 4}
_WRAPPED = {"padding": "CIRCULAR", "strides": 2, "use_bias": False} | _FLOAT_OUT
_FLIPPED = {"transpose_kernel": True, "kernel_dilation": 2} | _FULL
_INITS = {
    "kernel_init": nnx.initializers.lecun_normal(),
    "bias_init": nnx.initializers.normal(),
}
# No mesh is needed until the sharding is put into effect.
_METADATA = {
    "kernel_metadata": {"out_sharding": (None, "model"), "eager_sharding": False},
    "bias_metadata": {"note": "mine"},
}


def _uniform(key, shape, dtype):
    """An initialiser that compiles nothing; Flax's own takes a second for a shape."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    return jnp.asarray(rng.uniform(-0.5, 0.5, shape), dtype)


def _doubled(operation):
    return lambda *args, **kwargs: 2 * operation(*args, **kwargs)


def _to_half(arrays, dtype=None):
    inputs, kernel, bias = arrays  # always three, says Flax
    bias = None if bias is None else bias.astype(jnp.bfloat16)
    return inputs.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), bias


_OWN = {"conv_general_dilated": _doubled(lax.conv_general_dilated)}
_TO_HALF = {"promote_dtype": _to_half}
_DOT = {"dot_general": _doubled(lax.dot_general)}
_DOT_CLASS = {"dot_general_cls": lambda: _doubled(lax.dot_general)}
_CONV2D = (16, 8, (3, 3))
_HEADS = ("nta,hab->nthb", (4, 16, 3), (4, 3))


def _grid(kind, arguments, shape, *options):
    """Cases that have their arguments, and some options, in common."""
    return [(kind, arguments, option, shape) for option in options]


# (layer, its arguments, its options, input shape): what Flax documents. Options that
# do not meet in the code of a layer share a case.
_DENSES = (
    *_grid("Linear", (32, 8), (4, 32), _INITS, _METADATA | _FULL, _HALF | _FLOAT_OUT),
    *_grid("Linear", (32, 8), (4, 32), _TO_HALF | {"use_bias": False}),
    *_grid("Linear", (32, 8), (2, 3, 5, 32), _DOT),
    *_grid("Linear", (21, 8), (21,), _HALF_PARAMS),
    *_grid("LinearGeneral", (32, (4, 5)), (3, 32), _INITS, _METADATA | _HALF),
    *_grid("LinearGeneral", ((4, 8), 6), (3, 5, 4, 8), _FULL | {"axis": (-2, -1)}),
    *_grid("LinearGeneral", ((4, 8), (2, 3)), (3, 4, 5, 8), _DOT | {"axis": (1, -1)}),
    *_grid("LinearGeneral", (16, 4), (2, 3, 16), _HALF_PARAMS | {"batch_axis": {0: 2}}),
    *_grid("LinearGeneral", (32, 4), (3, 32), _DOT_CLASS | _HALF | _FLOAT_OUT),
    *_grid("Einsum", _HEADS, (2, 5, 16), _INITS, _METADATA | _HALF | _FLOAT_OUT),
    *_grid("Einsum", _HEADS, (2, 5, 16), _FULL | {"einsum_op": _doubled(jnp.einsum)}),
    *_grid("Einsum", ("...a, ab -> ...b", (16, 3)), (2, 3, 5, 16), _HALF_PARAMS),
    *_grid("Einsum", ("btgd,gdh->btgh", (4, 16, 3), (4, 3)), (2, 5, 4, 16), {}),
)
_CONVS = (
    *_grid("Conv", _CONV2D, (2, 6, 6, 16), _MASK | _FULL, _GROUPS | _FLOAT_OUT),
    *_grid("Conv", _CONV2D, (2, 6, 6, 16), _METADATA | {"padding": "CIRCULAR"}),
    *_grid("Conv", _CONV2D, (2, 6, 6, 16), _HALF | {"padding": "REFLECT"}),
    *_grid("Conv", _CONV2D, (2, 6, 6, 16), _HALF_PARAMS | {"padding": "VALID"}),
    *_grid("Conv", _CONV2D, (6, 6, 16), {"padding": ((1, 2), 0)}),
    *_grid("Conv", _CONV2D, (2, 6, 6, 16), {"strides": 2, "kernel_dilation": 2}),
    *_grid("Conv", _CONV2D, (2, 4, 4, 16), _OWN | {"input_dilation": 2, "padding": 1}),
    *_grid("Conv", (16, 8, (3,)), (2, 9, 16), {"padding": "CAUSAL"}),
    *_grid("Conv", (16, 8, 3), (2, 3, 6, 16), _INITS | {"use_bias": False}),
    *_grid("ConvTranspose", _CONV2D, (2, 4, 4, 16), _HALF | _METADATA, _MASK),
    *_grid("ConvTranspose", _CONV2D, (2, 4, 4, 16), _WRAPPED, _FLIPPED),
    *_grid("ConvTranspose", _CONV2D, (4, 4, 16), _TO_HALF | {"padding": ((1, 2), 0)}),
    *_grid("ConvTranspose", (16, 8, 3), (2, 6, 16), _TO_HALF | {"use_bias": False}),
    *_grid("ConvTranspose", (16, 8, (3,)), (2, 6, 16), _HALF_PARAMS | {"strides": 2}),
    *_grid("ConvTranspose", (16, 8, 3), (2, 3, 6, 16), _INITS | {"padding": "VALID"}),
)
# One of each, with an input that its chunks do not divide.
_EACH = (
    ("Linear", (21, 8), {}, (3, 5, 21)),
    ("LinearGeneral", ((3, 7), 6), {"axis": (-2, -1)}, (3, 5, 3, 7)),
    ("Einsum", ("nta,hab->nthb", (4, 21, 3), (4, 3)), {}, (2, 5, 21)),
    ("Conv", (5, 8, (3, 3)), {}, (2, 5, 6, 5)),
    ("ConvTranspose", (5, 8, (3, 3)), {"strides": 2}, (2, 5, 6, 5)),
)


def _input(*shape):
    x = np.random.default_rng(0).normal(size=shape)
    return jnp.asarray(np.round(x, 1), jnp.float32)  # with ties


def _layers(kind, arguments, options, *policies):
    """Flax's layer, and ours with each policy, made from the same keys."""
    options = {"kernel_init": _uniform} | options
    theirs = getattr(nnx, kind)(*arguments, **options, rngs=nnx.Rngs(0))
    ours = functools.partial(getattr(dn, kind), *arguments, **options)
    return theirs, *(ours(dropit=policy, rngs=nnx.Rngs(0)) for policy in policies)


def _params(model):
    return nnx.state(model, nnx.Param)


def _run(layers, *inputs, **options):
    """For each layer its output, and the gradients of its parameters and inputs.

    All are one program: it takes less time to compile.
    """
    graphs, params, others = zip(
        *(nnx.split(layer, nnx.Param, ...) for layer in layers), strict=True
    )

    def run_one(graph, params, rest, inputs):
        def call(params, *inputs):
            return nnx.merge(graph, params, rest, copy=True)(*inputs, **options)

        out, pullback = jax.vjp(call, params, *inputs)
        cotangent = jnp.cos(jnp.arange(out.size)).reshape(out.shape)
        to_params, *to_inputs = pullback(cotangent.astype(out.dtype))
        return out, nnx.to_pure_dict(to_params), to_inputs

    @jax.jit
    def run(params, others, inputs):
        parts = zip(graphs, params, others, strict=True)
        return [run_one(*part, inputs) for part in parts]

    return run(params, others, inputs)


def _bytes(model, *inputs):
    """Bytes cached by a model for its gradients."""
    graph, state = nnx.split(model)

    def gradients(state, inputs):
        return nnx.grad(lambda m: m(*inputs).sum())(nnx.merge(graph, state))

    return memory.cached_bytes(gradients, state, inputs)


def _residual_bytes(shape, itemsize=4):
    """Bytes of what `DropIT(0.5)` keeps of a tensor that its chunks of 16 divide."""
    size = np.prod(shape)
    return size // 2 * itemsize + min(reference.position_bytes(shape, 0.5, 16))


def _program(model, x):
    """What the gradient of a model compiles to, before it is compiled."""
    graph, state = nnx.split(model)
    loss = lambda model, x: model(x).sum()  # noqa: E731
    gradient = lambda state, x: nnx.grad(loss)(nnx.merge(graph, state), x)  # noqa: E731
    return str(jax.make_jaxpr(gradient)(state, x))


def _train(model, loss_fn, steps):
    """The losses of some steps."""
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, gradients)
        return loss

    return [float(step(model, optimizer)) for _ in range(steps)]


class LayerTest(parameterized.TestCase):
    @parameterized.parameters(*_DENSES, *_CONVS)
    def test_is_flaxs_layer_but_for_the_kernels_gradient(
        self, kind, arguments, options, shape
    ):
        x = _input(*shape)
        theirs, ours, exact = _layers(kind, arguments, options, _POLICY, DropIT(0.0))
        # Metadata is a part of the structure that is compared.
        chex.assert_trees_all_equal(_params(ours), _params(theirs))
        chex.assert_trees_all_equal_dtypes(_params(ours), _params(theirs))
        (expected,) = _run([theirs], x)
        actual, undropped = _run([ours, exact], x)
        reference.assert_same_bits(actual[0], expected[0])
        reference.assert_same_bits(actual[2][0], expected[2][0])
        if "bias" in expected[1]:
            reference.assert_same_bits(actual[1]["bias"], expected[1]["bias"])
        kernel, expected_kernel = actual[1]["kernel"], expected[1]["kernel"]
        self.assertFalse(np.array_equal(kernel, expected_kernel))
        self.assertEqual(kernel.dtype, expected_kernel.dtype)
        chex.assert_trees_all_close(undropped, expected, rtol=1e-6, atol=1e-6)

    @parameterized.parameters(*_EACH)
    def test_kernels_gradient_is_flaxs_at_the_sparse_input(
        self, kind, arguments, options, shape
    ):
        x = _input(*shape)
        theirs, ours = _layers(kind, arguments, options, DropIT(0.75, chunk_size=10))
        sparse = jnp.asarray(reference.sparse(x, 0.75, 10))
        (actual,), (expected,) = _run([ours], x), _run([theirs], sparse)
        chex.assert_trees_all_close(
            actual[1]["kernel"], expected[1]["kernel"], rtol=1e-5, atol=1e-5
        )

    @parameterized.parameters(
        *_EACH, ("MultiHeadAttention", (2, 16), {"decode": False}, (2, 5, 16))
    )
    def test_without_a_policy_it_is_flaxs_layer(self, kind, arguments, options, shape):
        theirs, ours = _layers(kind, arguments, options, None)
        self.assertEqual(
            _program(ours, _input(*shape)), _program(theirs, _input(*shape))
        )

    def test_an_equation_may_come_with_the_call(self):
        x = _input(2, 5, 16)
        theirs, ours = _layers("Einsum", ("bti,io->bto", (16, 3)), {}, _POLICY)
        theirs.einsum_str = ours.einsum_str = None
        reference.assert_same_bits(
            ours(x, einsum_str="bti,io->obt"), theirs(x, einsum_str="bti,io->obt")
        )

    def test_hooks_are_put_back(self):
        own = functools.partial(lax.dot_general)
        options = _TO_HALF | {"dot_general": own}
        layer = dn.Linear(16, 4, **options, dropit=_POLICY, rngs=nnx.Rngs(0))
        layer(_input(2, 16))
        with pytest.raises(TypeError, match="dot_general"):
            layer(_input(2, 17))
        self.assertIs(layer.dot_general, own)
        self.assertIs(layer.promote_dtype, _to_half)

    @parameterized.parameters(
        (np.arange(32).reshape(2, 16),), (np.ones((2, 16)).tolist(),)
    )
    def test_what_is_not_a_float_array_is_promoted_as_in_flax(self, x):
        for policy in (_POLICY, _RANDOM):
            theirs, ours = _layers("Linear", (16, 4), {}, policy)
            reference.assert_same_bits(ours(x), theirs(x))

    def test_only_a_policy_is_taken(self):
        for cls in (dn.Linear, dn.MultiHeadAttention):
            with pytest.raises(TypeError, match=r"got 0\.5"):
                cls(4, 4, dropit=0.5, rngs=nnx.Rngs(0))

    def test_a_random_strategy_takes_a_stream(self):
        with pytest.raises(ValueError, match=r"nnx\.Rngs\(dropit=seed\)"):
            dn.Linear(16, 4, dropit=_RANDOM, rngs=nnx.Rngs(params=0))


class AttentionTest(parameterized.TestCase):
    @parameterized.parameters(
        _HALF | {"normalize_qk": True},
        {"num_kv_heads": 2, "qkv_features": 32, "out_features": 8, "use_bias": False},
    )
    def test_is_flaxs_layer_but_for_the_kernels_gradients(self, **options):
        x = _input(2, 5, 16)
        mask = nnx.make_causal_mask(jnp.ones((2, 5)))
        options |= {"decode": False}
        theirs, ours, exact = _layers(
            "MultiHeadAttention", (4, 16), options, _POLICY, DropIT(0.0)
        )
        chex.assert_trees_all_equal(_params(ours), _params(theirs))
        (expected,) = _run([theirs], x, mask=mask)
        actual, undropped = _run([ours, exact], x, mask=mask)
        reference.assert_same_bits(actual[0], expected[0])
        reference.assert_same_bits(actual[2][0], expected[2][0])
        chex.assert_trees_all_close(undropped, expected, rtol=1e-6, atol=1e-6)
        for name, gradients in actual[1].items():
            if "kernel" in gradients:
                kernel = expected[1][name].pop("kernel")
                self.assertFalse(np.array_equal(gradients.pop("kernel"), kernel))
        chex.assert_trees_all_equal(actual[1], expected[1])

    @parameterized.product(
        policy=(_POLICY, _RANDOM), dtype=(None, jnp.bfloat16), inputs=(1, 2, 3)
    )
    def test_an_input_is_cached_once(self, policy, dtype, inputs):
        layer = dn.MultiHeadAttention(
            2, 16, dtype=dtype, decode=False, dropit=policy, rngs=nnx.Rngs(0)
        )
        shape = (2, 5, 16)
        x = [_input(*shape) + i for i in range(inputs)]
        itemsize = 4 if dtype is None else 2
        # Those that are given, and the heads, which `out` reads.
        expected = inputs * _residual_bytes(shape, itemsize)
        expected += _residual_bytes((2, 5, 2, 8), itemsize)
        self.assertEqual(_bytes(layer, *x), expected)

    def test_decoding(self):
        x = _input(2, 4, 16)
        theirs, ours = _layers("MultiHeadAttention", (4, 16), {"decode": True}, _POLICY)
        for layer in (theirs, ours):
            layer.init_cache(x.shape)
        call = nnx.jit(lambda layer, token: layer(token))
        for i in range(4):
            token = x[:, i : i + 1]
            reference.assert_same_bits(call(ours, token), call(theirs, token))
        self.assertEqual(int(ours.cache_index[...]), 4)
        reference.assert_same_bits(ours.cached_key[...], theirs.cached_key[...])


class Scaled(nnx.Linear):
    def __call__(self, x, scale=0.5):
        return scale * super().__call__(jnp.tanh(x))


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
        self.x = _input(2, 6, 16)

    def _loss(self, model):
        return jnp.mean((model(self.x) - 1) ** 2)

    def test_converts_every_layer_and_takes_it_back(self):
        (expected,) = _run([self.model], self.x)
        variables = _variables(self.model)
        self.assertEqual(
            dn.apply(self.model, _POLICY),
            [dn.Change(path, kind, None, _POLICY) for path, kind in _KINDS.items()],
        )
        (actual,) = _run([self.model], self.x)
        chex.assert_trees_all_close(actual[::2], expected[::2], rtol=1e-5, atol=1e-5)
        equal = functools.partial(np.allclose, rtol=1e-4, atol=1e-4)
        exact = jax.tree.map(equal, actual[1], expected[1])
        for path, is_exact in jax.tree.leaves_with_path(exact):
            self.assertEqual(is_exact, "kernel" not in str(path[-1]), path)

        self.assertEqual(
            dn.apply(self.model, None),
            [dn.Change(path, kind, _POLICY, None) for path, kind in _KINDS.items()],
        )
        chex.assert_trees_all_equal(_run([self.model], self.x), [expected])
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
        self.assertEqual(_bytes(layer, self.x), _residual_bytes(self.x.shape))

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
            self.assertEqual(_bytes(layers[0], self.x), _residual_bytes(self.x.shape))
            dn.apply(layers, None)
        self.assertEqual(_bytes(layers[0], self.x), 0)

    def test_each_call_of_a_random_strategy_drops_other_elements(self):
        layer = nnx.Linear(64, 3, rngs=nnx.Rngs(0))
        dn.apply(layer, _RANDOM, rngs=nnx.Rngs(dropit=1))
        gradient = nnx.jit(lambda m, x: nnx.grad(lambda m: m(x).sum())(m))
        x = _input(1, 64) + 10
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
        original, copied = _run([self.model.stem, copy.stem], self.x)
        chex.assert_trees_all_equal(copied, original)
        self.assertEqual(_bytes(copy, self.x), _bytes(self.model, self.x))

    def test_training(self):
        dn.apply(self.model, _RANDOM, rngs=nnx.Rngs(0))
        losses = _train(self.model, self._loss, steps=6)
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
        images, labels = _input(6, 8, 8, 3), jnp.arange(6) % 4
        call = nnx.jit(lambda model: model(images, deterministic=True))
        expected = call(model)
        changes = dn.apply(model, DropIT(0.75), skip_first=call)
        names = [f"self_attn/{n}_proj" for n in ("query", "key", "value", "output")]
        names += ["ffn/dense1", "ffn/dense2"]
        paths = [f"layers/0/{name}" for name in names]
        # `nnx.jit` sorts the attributes of a model.
        self.assertCountEqual(_paths(changes), [*paths, "head"])
        reference.assert_same_bits(call(model), expected)
        self.assertGreater(_bytes(model, images), 0)

        def loss(model):
            logits = model(images, deterministic=True)
            cross_entropy = optax.softmax_cross_entropy_with_integer_labels
            return cross_entropy(logits, labels).mean()

        losses = _train(model, loss, steps=15)
        self.assertLess(losses[-1], 0.7 * losses[0])


if __name__ == "__main__":
    absltest.main()
