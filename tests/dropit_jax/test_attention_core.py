import functools
from unittest import mock

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

import dropit_jax
from dropit_jax.nn import attention
from tests.dropit_jax import pullbacks, reference

_OURS = dropit_jax.nn.dot_product_attention
_KEY = jax.random.key(7)
_BATCH, _LENGTH, _HEADS, _DEPTH = 2, 5, 4, 8
_CAUSAL = nn.make_causal_mask(jnp.ones((_BATCH, _LENGTH)), dtype=bool)
_BIAS = jnp.asarray(
    np.random.default_rng(9).normal(size=(1, _HEADS, _LENGTH, _LENGTH)), jnp.float32
)


def _qkv(dtype="float32", kv_heads=_HEADS, batch=(_BATCH,)):
    rng = np.random.default_rng(0)
    shapes = (*batch, _LENGTH, _HEADS, _DEPTH), (*batch, _LENGTH, kv_heads, _DEPTH)
    return [jnp.asarray(rng.normal(size=shapes[i > 0]), dtype) for i in range(3)]


def _assert_same(ours, theirs, *args):
    value, gradients = pullbacks.value_and_gradients(ours, *args)
    expected, expected_gradients = pullbacks.value_and_gradients(theirs, *args)
    reference.assert_same_bits(value, expected)
    # The derivative of the softmax is the same formula, rounded in other places.
    rounding = 16 * float(jnp.finfo(value.dtype).eps)
    chex.assert_trees_all_close(
        gradients, expected_gradients, rtol=rounding, atol=rounding
    )


class FunctionTest(parameterized.TestCase):
    @parameterized.parameters(
        {"mask": _CAUSAL[:1, :, :1].astype(jnp.float32), "precision": "highest"},
        {"bias": _BIAS, "mask": _CAUSAL},
        {
            "dropout_rng": jax.random.key_data(_KEY),
            "dropout_rate": 0.5,
            "broadcast_dropout": False,
        },
        {"dropout_rng": _KEY, "dropout_rate": 0.5, "deterministic": True},
        {"dtype": "bfloat16", "force_fp32_for_softmax": True},
        {"einsum_dot_general": jax.lax.dot_general, "precision": ("high", "highest")},
        {"qk_attn_weights_einsum": jnp.einsum, "attn_weights_value_einsum": jnp.einsum},
    )
    def test_is_linens(self, **kwargs):
        self._assert_same(nn.dot_product_attention, kwargs, {}, _qkv())

    @parameterized.parameters(
        ({"mask": _CAUSAL, "dtype": jnp.bfloat16},),
        ({"bias": _BIAS, "is_causal": True},),
        ({}, 2),
        ({"dropout_rng": _KEY, "dropout_rate": 0.5, "mask": _CAUSAL}, 1),
        ({"promote_dtype": lambda arrays, dtype: arrays},),
    )
    def test_is_nnxs(self, kwargs, kv_heads=_HEADS):
        is_causal = {} if "promote_dtype" in kwargs else {"is_causal": False}
        qkv = _qkv(kv_heads=kv_heads)
        self._assert_same(nnx.dot_product_attention, kwargs, is_causal, qkv)

    def _assert_same(self, theirs, kwargs, ours_alone, qkv):
        kwargs = dict(kwargs)
        bias = kwargs.pop("bias", None)
        args = qkv if bias is None else (*qkv, bias)
        _assert_same(
            functools.partial(_OURS, **(ours_alone | kwargs)),
            functools.partial(theirs, **kwargs),
            *args,
        )

    @parameterized.parameters((), (2, 3))
    def test_any_number_of_batch_axes(self, *batch):
        _assert_same(_OURS, nn.dot_product_attention, *_qkv(batch=batch))

    @parameterized.parameters({}, {"is_causal": False})
    def test_caches_its_arguments_alone(self, **kwargs):
        qkv = _qkv()

        def cached(*args, **more):
            attend = functools.partial(_OURS, **kwargs, **more)
            leaves = jax.tree.leaves(
                jax.eval_shape(lambda *a: jax.vjp(attend, *a)[1], *args)
            )
            return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

        arguments = sum(array.nbytes for array in qkv)
        self.assertEqual(cached(*qkv), arguments)
        self.assertEqual(cached(*qkv, _BIAS), arguments + _BIAS.nbytes)
        masked = cached(*qkv, mask=_CAUSAL)
        self.assertEqual(masked, arguments + _CAUSAL.nbytes)
        dropped = cached(*qkv, dropout_rng=_KEY, dropout_rate=0.5)
        self.assertEqual(dropped, arguments + _KEY.nbytes)

    @parameterized.parameters(
        ({"is_causal": False, "force_fp32_for_softmax": True}, "force_fp32.*is_causal"),
        (
            {"is_causal": True, "einsum_dot_general": jax.lax.dot_general},
            "einsum_dot_general.*is_causal",
        ),
    )
    def test_arguments_of_both_are_refused(self, kwargs, message):
        with pytest.raises(TypeError, match=message):
            _OURS(*_qkv(), **kwargs)

    @parameterized.parameters(
        ((5, 8), (5, 8), (5, 8)),
        ((5, 4, 8), (5, 8), (5, 4, 8)),
        ((2, 5, 4, 8), (3, 5, 4, 8), (2, 5, 4, 8)),
        ((5, 4, 8), (5, 2, 8), (5, 4, 8)),
        ((5, 4, 8), (5, 4, 6), (5, 4, 8)),
        ((5, 4, 8), (6, 4, 8), (5, 4, 8)),
    )
    def test_shapes_that_do_not_go_together_are_flaxs_error(self, *shapes):
        arrays = [jnp.ones(shape) for shape in shapes]
        with pytest.raises(Exception) as theirs:  # noqa: PT011  # of whatever type
            nn.dot_product_attention(*arrays)
        # Below the function whose annotations are checked in tests, not for users.
        attend = attention._attending(nn.dot_product_attention)
        with pytest.raises(theirs.type) as ours:
            attend(*arrays, None, None, None)
        self.assertEqual(str(ours.value), str(theirs.value))


class LinenTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"dropout_rate": 0.5, "deterministic": False}, {}),
        ({"normalize_qk": True, "dtype": jnp.bfloat16}, {}),
        (
            {
                "qk_attn_weights_einsum_cls": lambda: jnp.einsum,
                "attn_weights_value_einsum_cls": lambda: jnp.einsum,
                "force_fp32_for_softmax": True,
            },
            {"mask": _CAUSAL},
        ),
    )
    def test_serves_as_attention_fn(self, attributes, call):
        x = _qkv()[0].reshape(_BATCH, _LENGTH, -1)
        layer = functools.partial(nn.MultiHeadDotProductAttention, _HEADS, **attributes)
        ours, theirs = layer(attention_fn=_OURS), layer()
        rngs = {"dropout": _KEY, "params": _KEY}
        variables = jax.jit(functools.partial(theirs.init, **call))(rngs, x)

        def apply(layer, variables, x):
            return layer.apply(variables, x, rngs=rngs, **call)

        _assert_same(
            *(functools.partial(apply, layer) for layer in (ours, theirs)), variables, x
        )

    def test_sows_weights(self):
        x = _qkv()[0].reshape(_BATCH, _LENGTH, -1)
        layer = functools.partial(nn.MultiHeadDotProductAttention, _HEADS)
        variables = layer().init(_KEY, x)
        ours, theirs = (
            jax.jit(
                functools.partial(
                    layer.apply, mutable=["intermediates"], sow_weights=True
                )
            )(variables, x)
            for layer in (layer(attention_fn=_OURS), layer())
        )
        self.assertIn("attention_weights", ours[1]["intermediates"])
        chex.assert_trees_all_equal(ours, theirs)

    def test_decodes(self):
        x = _qkv()[0].reshape(_BATCH, _LENGTH, -1)
        layer = functools.partial(nn.MultiHeadDotProductAttention, _HEADS, decode=True)
        outs = []
        for each in (layer(attention_fn=_OURS), layer()):
            variables = each.init(_KEY, x)
            params, cache = variables["params"], variables["cache"]
            step = jax.jit(functools.partial(each.apply, mutable=["cache"]))
            for position in range(2):
                token = x[:, position : position + 1]
                out, updated = step({"params": params, "cache": cache}, token)
                cache = updated["cache"]
            outs.append((out, cache))
        chex.assert_trees_all_equal(*outs)

    def test_an_einsum_with_variables_is_left_to_flax(self):
        class Scaled(nn.Module):
            @nn.compact
            def __call__(self, equation, *operands):
                scale = self.param("scale", nn.initializers.constant(0.5), ())
                return scale * jnp.einsum(equation, *operands)

        x = _qkv()[0].reshape(_BATCH, _LENGTH, -1)
        layer = functools.partial(
            nn.MultiHeadDotProductAttention,
            _HEADS,
            qk_attn_weights_einsum_cls=Scaled,
            attn_weights_value_einsum_cls=Scaled,
        )
        variables = layer().init(_KEY, x)
        gradients = [
            jax.jit(jax.grad(lambda v, each=each: each.apply(v, x).sum()))(variables)
            for each in (layer(attention_fn=_OURS), layer())
        ]
        self.assertIn("Scaled_0", gradients[0]["params"])
        chex.assert_trees_all_close(*gradients, rtol=1e-6, atol=1e-6)


# Flax's own warning, of another way to read what is sown.
@pytest.mark.filterwarnings("ignore:Using 'Module.sow")
class NnxTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"num_kv_heads": 2}, {"is_causal": True, "mask": _CAUSAL}),
        ({"dropout_rate": 0.5, "deterministic": False}, {}),
        ({}, {"sow_weights": True}),
    )
    def test_serves_as_attention_fn(self, attributes, call):
        x = _qkv()[0].reshape(_BATCH, _LENGTH, -1)

        def run(**attention_fn):
            layer = nnx.MultiHeadAttention(
                _HEADS,
                x.shape[-1],
                decode=False,
                rngs=nnx.Rngs(0),
                **attributes,
                **attention_fn,
            )

            @nnx.jit
            def gradients(layer, x):
                def loss(layer, x):
                    return jnp.sum(jnp.sin(layer(x, **call)))

                return nnx.value_and_grad(loss, argnums=(0, 1))(layer, x)

            value, (gradient, dx) = gradients(layer, x)
            intermediates = nnx.pop(layer, nnx.Intermediate)
            return jax.tree.leaves((value, nnx.state(gradient), dx, intermediates))

        chex.assert_trees_all_close(
            run(attention_fn=_OURS), run(), rtol=2e-6, atol=2e-6
        )

    def test_decodes(self):
        x = _qkv()[0].reshape(_BATCH, _LENGTH, -1)
        outs = []
        for fn in ({"attention_fn": _OURS}, {}):
            layer = nnx.MultiHeadAttention(
                _HEADS, x.shape[-1], decode=True, rngs=nnx.Rngs(0), **fn
            )
            layer.init_cache(x.shape)
            for position in range(2):
                outs.append(layer(x[:, position : position + 1]))
        chex.assert_trees_all_equal(outs[:2], outs[2:])


class TransformationsTest(parameterized.TestCase):
    def test_gradients_are_those_of_flax(self):
        qkv = tuple(_qkv())

        def loss(fn, qkv):
            return jnp.sum(jnp.sin(fn(*qkv, mask=_CAUSAL[0])))

        ours, theirs = (
            functools.partial(loss, fn) for fn in (_OURS, nn.dot_product_attention)
        )

        def scanned(qkv):
            return jax.lax.scan(lambda s, x: (s + ours(x), None), 0.0, qkv)[0]

        @jax.jit
        def gradients(qkv):
            return (
                jax.vmap(jax.grad(theirs))(qkv),
                jax.vmap(jax.grad(ours))(qkv),
                jax.vmap(jax.grad(jax.checkpoint(ours)))(qkv),
                jax.lax.map(jax.grad(ours), qkv),
                jax.grad(scanned)(qkv),
            )

        expected, *actual = gradients(qkv)
        for gradient in actual:
            chex.assert_trees_all_close(gradient, expected, rtol=1e-5, atol=1e-6)

    def test_is_traced_once(self):
        @jax.jit
        def twice(qkv):
            query, key, value = qkv
            out = _OURS(query, key, value, dropout_rng=_KEY, dropout_rate=0.375)
            return _OURS(out, key, value, dropout_rng=_KEY, dropout_rate=0.375)

        with mock.patch.object(jax.nn, "softmax", wraps=jax.nn.softmax) as softmax:
            twice.lower(_qkv())
        self.assertEqual(softmax.call_count, 1)

    def test_no_tracer_outlives_its_trace(self):
        def loss(qkv, scale, rate):
            def scaled(equation, *operands):
                return scale * jnp.einsum(equation, *operands)

            einsums = {
                "qk_attn_weights_einsum": scaled,
                "attn_weights_value_einsum": scaled,
            }
            dropped = _OURS(*qkv, mask=_CAUSAL, dropout_rng=_KEY, dropout_rate=rate)
            return _OURS(*qkv, **einsums).sum() + dropped.sum()

        with jax.checking_leaks():
            for rate in (0.0, 0.5):
                step = jax.jit(
                    jax.value_and_grad(functools.partial(loss, rate=rate), argnums=1)
                )
                value, gradient = step(_qkv(), 2.0)
                self.assertNotEqual(gradient, 0)
        np.testing.assert_allclose(value, loss(_qkv(), 2.0, 0.5), rtol=1e-4)

    @parameterized.parameters(AxisType.Auto, AxisType.Explicit)
    def test_on_a_mesh_nothing_moves(self, axis_type):
        axes = ("data", "model")
        mesh = jax.make_mesh((4, 2), axes, axis_types=(axis_type,) * 2)
        qkv = _qkv(batch=(8,))

        def gradient(*qkv):
            def loss(*qkv):
                out = _OURS(*qkv, dropout_rng=_KEY, dropout_rate=0.5)
                return jnp.sum(jnp.sin(out))

            return jax.grad(loss, argnums=(0, 1, 2))(*qkv)

        expected = jax.device_get(jax.jit(gradient)(*qkv))
        with jax.set_mesh(mesh):
            spec = PartitionSpec("data", None, "model", None)
            sharded = [jax.device_put(array, spec) for array in qkv]
            compiled = jax.jit(gradient).lower(*sharded).compile()
            self.assertNotRegex(compiled.as_text(), "all-|collective|reduce-scatter")
            actual = jax.device_get(compiled(*sharded))
        chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    absltest.main()
