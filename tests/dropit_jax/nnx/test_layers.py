import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import nnx
from jax import lax

from dropit_jax import DropIT
from dropit_jax import nnx as dn
from tests.dropit_jax import reference
from tests.dropit_jax.nnx import nnx_runs as runs

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
    *_grid("Einsum", (" ab c , c d - > a b d", (7, 6), (6,)), (3, 4, 7), {}),
    *_grid("Einsum", ("abc,cd- >abd", (7, 6)), (3, 4, 7), {}),
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


def _layers(kind, arguments, options, *policies):
    """Flax's layer, and ours with each policy, made from the same keys."""
    options = {"kernel_init": _uniform} | options
    theirs = getattr(nnx, kind)(*arguments, **options, rngs=nnx.Rngs(0))
    ours = functools.partial(getattr(dn, kind), *arguments, **options)
    return theirs, *(ours(dropit=policy, rngs=nnx.Rngs(0)) for policy in policies)


def _program(model, x):
    """Returns the jaxpr of a model's gradient, as text."""
    graph, state = nnx.split(model)
    loss = lambda model, x: model(x).sum()  # noqa: E731
    gradient = lambda state, x: nnx.grad(loss)(nnx.merge(graph, state), x)  # noqa: E731
    return str(jax.make_jaxpr(gradient)(state, x))


class LayerTest(parameterized.TestCase):
    @parameterized.parameters(*_DENSES, *_CONVS)
    def test_is_flaxs_layer_but_for_the_kernels_gradient(
        self, kind, arguments, options, shape
    ):
        x = runs.numbers(*shape)
        theirs, ours, exact = _layers(kind, arguments, options, _POLICY, DropIT(0.0))
        # Metadata is a part of the structure that is compared.
        chex.assert_trees_all_equal(runs.params(ours), runs.params(theirs))
        chex.assert_trees_all_equal_dtypes(runs.params(ours), runs.params(theirs))
        (expected,) = runs.run([theirs], x)
        actual, undropped = runs.run([ours, exact], x)
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
        x = runs.numbers(*shape)
        theirs, ours = _layers(kind, arguments, options, DropIT(0.75, chunk_size=10))
        sparse = jnp.asarray(reference.sparse(x, 0.75, 10))
        (actual,), (expected,) = runs.run([ours], x), runs.run([theirs], sparse)
        chex.assert_trees_all_close(
            actual[1]["kernel"], expected[1]["kernel"], rtol=1e-5, atol=1e-5
        )

    @parameterized.parameters(
        *_EACH, ("MultiHeadAttention", (2, 16), {"decode": False}, (2, 5, 16))
    )
    def test_without_a_policy_it_is_flaxs_layer(self, kind, arguments, options, shape):
        theirs, ours = _layers(kind, arguments, options, None)
        self.assertEqual(
            _program(ours, runs.numbers(*shape)), _program(theirs, runs.numbers(*shape))
        )

    def test_arguments_that_flax_does_not_take_are_refused(self):
        layer = dn.ConvTranspose(4, 5, (3,), dropit=DropIT(), rngs=nnx.Rngs(0))
        with pytest.raises(TypeError, match="out_sharding"):
            layer(jnp.ones((1, 6, 4)), out_sharding=None)

    def test_an_equation_may_come_with_the_call(self):
        x = runs.numbers(2, 5, 16)
        theirs, ours = _layers("Einsum", ("bti,io->bto", (16, 3)), {}, _POLICY)
        theirs.einsum_str = ours.einsum_str = None
        reference.assert_same_bits(
            ours(x, einsum_str="bti,io->obt"), theirs(x, einsum_str="bti,io->obt")
        )

    def test_hooks_are_put_back(self):
        own = functools.partial(lax.dot_general)
        options = _TO_HALF | {"dot_general": own}
        layer = dn.Linear(16, 4, **options, dropit=_POLICY, rngs=nnx.Rngs(0))
        layer(runs.numbers(2, 16))
        with pytest.raises(TypeError, match="dot_general"):
            layer(runs.numbers(2, 17))
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
        x = runs.numbers(2, 5, 16)
        mask = nnx.make_causal_mask(jnp.ones((2, 5)))
        options |= {"decode": False}
        theirs, ours, exact = _layers(
            "MultiHeadAttention", (4, 16), options, _POLICY, DropIT(0.0)
        )
        chex.assert_trees_all_equal(runs.params(ours), runs.params(theirs))
        (expected,) = runs.run([theirs], x, mask=mask)
        actual, undropped = runs.run([ours, exact], x, mask=mask)
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
    def test_each_projection_caches_its_input(self, policy, dtype, inputs):
        layer = dn.MultiHeadAttention(
            2, 16, dtype=dtype, decode=False, dropit=policy, rngs=nnx.Rngs(0)
        )
        shape = (2, 5, 16)
        x = [runs.numbers(*shape) + i for i in range(inputs)]
        itemsize = 4 if dtype is None else 2
        # Of query, key and value, and of the heads, which `out` reads.
        expected = 3 * runs.residual_bytes(shape, itemsize)
        expected += runs.residual_bytes((2, 5, 2, 8), itemsize)
        self.assertEqual(runs.cached_bytes(layer, *x), expected)

    def test_decoding(self):
        x = runs.numbers(2, 4, 16)
        theirs, ours = _layers("MultiHeadAttention", (4, 16), {"decode": True}, _POLICY)
        for layer in (theirs, ours):
            layer.init_cache(x.shape)
        call = nnx.jit(lambda layer, token: layer(token))
        for i in range(4):
            token = x[:, i : i + 1]
            reference.assert_same_bits(call(ours, token), call(theirs, token))
        self.assertEqual(int(ours.cache_index[...]), 4)
        reference.assert_same_bits(ours.cached_key[...], theirs.cached_key[...])


class SharedTest(parameterized.TestCase):
    """Threads may share a layer: a call changes nothing of it for any time."""

    @parameterized.parameters(
        (dn.Linear, (), "dot_general", lax.dot_general),
        (dn.Conv, ((3,),), "conv_general_dilated", lax.conv_general_dilated),
    )
    def test_a_call_leaves_the_layer_as_it_is(self, cls, args, hook, operation):
        seen = []

        def own(*args, **kwargs):
            seen.append(getattr(layer, hook))
            return operation(*args, **kwargs)

        rngs = nnx.Rngs(0)
        layer = cls(16, 16, *args, dropit=DropIT(0.5), rngs=rngs, **{hook: own})
        nnx.grad(lambda layer: jnp.sum(layer(jnp.ones((2, 8, 16)))))(layer)
        self.assertNotEmpty(seen)
        self.assertTrue(all(each is own for each in seen))


if __name__ == "__main__":
    absltest.main()
