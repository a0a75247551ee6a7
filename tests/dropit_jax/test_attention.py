import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from dropit_jax import DropIT, compress, memory
from dropit_jax import linen as dn
from tests.dropit_jax import reference

_POLICY = DropIT(0.5)
_BATCH, _LENGTH, _FEATURES = 2, 5, 32
_CAUSAL = nn.make_causal_mask(np.ones((_BATCH, _LENGTH)))

_SAVE_DROPIT = jax.checkpoint_policies.save_only_these_names("dropit")
_SCAN = functools.partial(
    nn.scan, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
)

# (layer, its arguments, how many different inputs, arguments of the call): what Flax
# documents.
_CASES = (
    ("MultiHeadDotProductAttention", {}, 1, {}),
    ("MultiHeadDotProductAttention", {}, 2, {}),
    ("MultiHeadDotProductAttention", {}, 3, {}),
    ("MultiHeadDotProductAttention", {}, 1, {"mask": _CAUSAL}),
    ("MultiHeadDotProductAttention", {"qkv_features": 16, "out_features": 8}, 2, {}),
    ("MultiHeadDotProductAttention", {"use_bias": False}, 1, {}),
    ("MultiHeadDotProductAttention", {"normalize_qk": True}, 1, {}),
    ("MultiHeadDotProductAttention", {"dtype": jnp.bfloat16}, 1, {}),
    ("MultiHeadDotProductAttention", {"param_dtype": jnp.bfloat16}, 2, {}),
    ("MultiHeadDotProductAttention", {"dropout_rate": 0.5}, 1, {}),
    (
        "MultiHeadDotProductAttention",
        {"dropout_rate": 0.5, "broadcast_dropout": False},
        2,
        {"dropout_rng": jax.random.key(5)},
    ),
    (
        "MultiHeadDotProductAttention",
        {
            "kernel_init": nn.initializers.normal(),
            "out_kernel_init": nn.initializers.ones,
            "bias_init": nn.initializers.normal(),
            "out_bias_init": nn.initializers.ones,
            "force_fp32_for_softmax": True,
        },
        1,
        {"sow_weights": True},
    ),
    (
        "MultiHeadDotProductAttention",
        {"qkv_dot_general": functools.partial(jax.lax.dot_general)},
        1,
        {},
    ),
    (
        "MultiHeadDotProductAttention",
        {
            "qkv_dot_general_cls": lambda: jax.lax.dot_general,
            "out_dot_general_cls": lambda: jax.lax.dot_general,
        },
        1,
        {},
    ),
    ("MultiHeadAttention", {}, 2, {"mask": _CAUSAL}),
    ("SelfAttention", {}, 1, {}),
    ("SelfAttention", {"precision": "highest"}, 1, {"mask": _CAUSAL}),
)


def _inputs(count):
    rng = np.random.default_rng(0)
    shape = (count, _BATCH, _LENGTH, _FEATURES)
    return tuple(jnp.asarray(np.round(rng.normal(size=shape), 1), jnp.float32))


def _layers(name, arguments):
    arguments = {"num_heads": 4, "deterministic": "dropout_rate" not in arguments} | (
        arguments
    )
    theirs = getattr(nn, name)(**arguments)
    return theirs, functools.partial(getattr(dn, name), **arguments)


def _apply(layer, variables, inputs, call):
    rngs = {"dropout": jax.random.key(3)}
    return layer.apply(variables, *inputs, **call, rngs=rngs)


def _runner(layer, call):
    """Output, and the gradients of variables and inputs."""

    def run(variables, inputs):
        apply = functools.partial(_apply, layer, call=call)
        out, pullback = jax.vjp(apply, variables, inputs)
        cotangent = jnp.cos(jnp.arange(out.size)).reshape(out.shape)
        return out, *pullback(cotangent.astype(out.dtype))

    return run


def _without_kernels(gradients):
    return {
        name: {kind: g for kind, g in layer.items() if kind != "kernel"}
        for name, layer in gradients["params"].items()
    }


# Flax's own warning.
@pytest.mark.filterwarnings("ignore:SelfAttention will be deprecated")
class AttentionTest(parameterized.TestCase):
    @parameterized.parameters(*_CASES)
    def test_is_flaxs_layer_but_for_the_kernels_gradients(
        self, name, arguments, count, call
    ):
        inputs = _inputs(count)
        theirs, make = _layers(name, arguments)
        rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        variables = jax.jit(theirs.init)(rngs, *inputs)
        chex.assert_trees_all_equal(
            jax.jit(make(dropit=_POLICY).init)(rngs, *inputs), variables
        )
        expected = jax.jit(_runner(theirs, call))(variables, inputs)
        runners = [_runner(make(dropit=d), call) for d in (_POLICY, DropIT(0.0))]
        actual, exact = jax.jit(lambda *args: [run(*args) for run in runners])(
            variables, inputs
        )
        reference.assert_same_bits(actual[0], expected[0])
        # The sum of what comes back from query, key and value may be in another order.
        tolerance = 1e-6 if "dtype" not in arguments else 2e-2
        for part in (
            lambda result: result[2],
            lambda result: _without_kernels(result[1]),
        ):
            chex.assert_trees_all_close(
                part(actual), part(expected), rtol=tolerance, atol=tolerance
            )
        for layer in ("query", "key", "value", "out"):
            kernels = [r[1]["params"][layer]["kernel"] for r in (actual, expected)]
            self.assertGreater(float(jnp.abs(kernels[0] - kernels[1]).max()), 0)
        chex.assert_trees_all_close(exact, expected, rtol=tolerance, atol=tolerance)

    @parameterized.parameters(
        ("MultiHeadDotProductAttention", 1),
        ("MultiHeadDotProductAttention", 2),
        ("MultiHeadDotProductAttention", 3),
        ("SelfAttention", 1),
    )
    def test_kernels_gradients_are_flaxs_at_the_sparse_input(self, name, count):
        inputs = _inputs(count)
        theirs, make = _layers(name, {})
        variables = theirs.init(jax.random.key(0), *inputs)
        actual = jax.jit(_runner(make(dropit=_POLICY), {}))(variables, inputs)
        actual = actual[1]["params"]
        # With the cotangents of the projections at hand, by Flax's own layer.
        cotangents = _projection_cotangents(theirs, variables, inputs)
        read = (*inputs, *inputs[-1:] * (3 - count))
        for layer, x in zip(("query", "key", "value"), read, strict=True):
            sparse = reference.sparse(x, _POLICY.rate, _POLICY.chunk_size)
            expected = jnp.einsum("btd,bthf->dhf", sparse, cotangents[layer])
            chex.assert_trees_all_close(
                actual[layer]["kernel"], expected, rtol=1e-4, atol=1e-5
            )

    @parameterized.parameters((1, 1), (2, 2), (3, 3))
    def test_an_input_is_cached_once(self, count, cached):
        inputs = _inputs(count)
        theirs, make = _layers("MultiHeadDotProductAttention", {})
        variables = theirs.init(jax.random.key(0), *inputs)
        layer = make(dropit=_POLICY)
        loss = jax.grad(lambda v, inputs: _apply(layer, v, inputs, {}).sum())
        # One for the output projection's input, which has the same size.
        expected = (cached + 1) * compress(inputs[0], _POLICY).nbytes
        self.assertEqual(memory.cached_bytes(loss, variables, inputs), expected)

    @parameterized.parameters(
        (lambda layer: layer, lambda loss: loss, 1),
        (lambda layer: layer, jax.jit, 1),
        (nn.jit, lambda loss: loss, 1),
        (lambda layer: nn.remat(layer, policy=_SAVE_DROPIT), lambda loss: loss, 1),
        (_SCAN, lambda loss: loss, 3),
        (
            lambda layer: _SCAN(nn.remat(layer, policy=_SAVE_DROPIT)),
            lambda loss: loss,
            3,
        ),
    )
    def test_an_input_is_cached_once_in_transformations(self, lift, transform, count):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                attention = dn.MultiHeadDotProductAttention(4, dropit=_POLICY)
                return attention(x), None

        (x,) = _inputs(1)
        model = lift(Layer)()
        shapes = jax.eval_shape(model.init, jax.random.key(0), x, None)
        loss = transform(lambda v, x: model.apply(v, x, None)[0].sum())
        expected = 2 * count * compress(x, _POLICY).nbytes
        self.assertEqual(memory.cached_bytes(jax.grad(loss), shapes, x), expected)

    @parameterized.parameters(jnp.bfloat16, jnp.float32)
    def test_a_cast_input_is_cached_once(self, dtype):
        (x,) = _inputs(1)
        theirs, make = _layers("SelfAttention", {"dtype": dtype})
        variables = theirs.init(jax.random.key(0), x)
        layer = make(dropit=_POLICY)
        loss = jax.grad(lambda v, x: _apply(layer, v, (x,), {}).sum())
        expected = 2 * compress(x.astype(dtype), _POLICY).nbytes
        self.assertEqual(memory.cached_bytes(loss, variables, x), expected)

    def test_decoding_is_flaxs(self):
        (x,) = _inputs(1)
        theirs, make = _layers("MultiHeadDotProductAttention", {"decode": True})
        outputs = []
        for layer in (theirs, make(dropit=_POLICY)):
            variables = layer.init(jax.random.key(0), x)
            step = jax.jit(functools.partial(layer.apply, mutable=["cache"]))
            tokens = []
            for i in range(_LENGTH):
                out, cache = step(variables, x[:, i : i + 1])
                variables = variables | cache
                tokens.append(out)
            outputs.append(jnp.concatenate(tokens, axis=1))
        reference.assert_same_bits(*outputs)

    def test_without_a_policy_it_is_flaxs_layer(self):
        (x,) = _inputs(1)
        theirs, make = _layers("MultiHeadDotProductAttention", {})
        variables = theirs.init(jax.random.key(0), x)
        programs = [
            str(
                jax.make_jaxpr(jax.grad(lambda v, m=m: _apply(m, v, (x,), {}).sum()))(
                    variables
                )
            )
            for m in (theirs, make())
        ]
        self.assertEqual(*programs)

    def test_random_strategies_drop_the_same_of_a_shared_input(self):
        (x,) = _inputs(1)
        policy = DropIT(0.5, strategy="random")
        _, make = _layers("SelfAttention", {})
        layer = make(dropit=policy)
        variables = layer.init(jax.random.key(0), x)

        def loss(variables, key):
            return layer.apply(variables, x, rngs={"dropit": key}).sum()

        key = jax.random.key(1)
        expected = 2 * compress(x, policy, key).nbytes
        self.assertEqual(memory.cached_bytes(jax.grad(loss), variables, key), expected)
        one, again, other = (
            jax.jit(jax.grad(loss))(variables, jax.random.key(seed))
            for seed in (1, 1, 2)
        )
        chex.assert_trees_all_equal(one, again)
        kernels = [g["params"]["query"]["kernel"] for g in (one, other)]
        self.assertGreater(float(jnp.abs(kernels[0] - kernels[1]).max()), 0)


def _projection_cotangents(layer, variables, inputs):
    """The cotangents of what query, key and value give, in Flax's layer."""
    shape = (_BATCH, _LENGTH, 4, _FEATURES // 4)
    zeros = {name: jnp.zeros(shape) for name in ("query", "key", "value")}

    def out(added):
        def add(method, args, kwargs, context):
            result = method(*args, **kwargs)
            return result + added.get(context.module.name, 0)

        with nn.intercept_methods(add):
            return _apply(layer, variables, inputs, {})

    value, pullback = jax.vjp(out, zeros)
    return pullback(jnp.cos(jnp.arange(value.size)).reshape(value.shape))[0]


if __name__ == "__main__":
    absltest.main()
