"""`intercept` changes kernel gradients alone, in every model and compiled function."""

import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax import lax

from dropit_jax import DropIT, memory
from dropit_jax import linen as dn
from tests.dropit_jax import reference
from tests.dropit_jax.linen.intercepted_models import (
    ATTENTION,
    BYTES,
    LIFTED,
    OTHER,
    OTHER_BYTES,
    POLICY,
    Compact,
    Lifted,
    OneLayer,
    Setup,
    X,
    bytes_cached,
    changed,
    gradient_of,
    numbers,
    paths_of,
    run_model,
    runner,
    shapes_of,
    variables_of,
)

_RANDOM = DropIT(0.5, strategy="random")


def _program(model, variables, x):
    """Returns the lowered text of the program that `run_model` compiles."""

    def run(variables, x, cotangent):
        out, pullback = jax.vjp(model.apply, variables, x)
        return out, *pullback(cotangent)

    cotangent = jax.eval_shape(model.apply, variables, x)
    return jax.jit(run).lower(variables, x, cotangent).as_text()


class InSequence(nn.Module):
    dense: Any = nn.Dense

    @nn.compact
    def __call__(self, x):
        layers = [nn.Dense(16, name="first"), nn.tanh, self.dense(4, name="second")]
        return nn.Sequential(layers)(x)


class CalledTwice(nn.Module):
    dense: Any = nn.Dense

    @nn.compact
    def __call__(self, x):
        first, shared = nn.Dense(16, name="first"), self.dense(16, name="shared")
        return shared(nn.tanh(first(nn.tanh(shared(nn.tanh(first(x)))))))


# (name of the layer, its arguments, input shape)
_KINDS = (
    ("Dense", {"features": 8}, (2, 3, 16)),
    ("Dense", {"features": 8, "dtype": jnp.bfloat16}, (6, 16)),
    ("DenseGeneral", {"features": (2, 4), "axis": (-2, -1)}, (3, 4, 8)),
    ("Einsum", {"shape": (16, 8), "einsum_str": "btc,cd->btd"}, (2, 3, 16)),
    ("Conv", {"features": 4, "kernel_size": (3, 3), "strides": 2}, (2, 5, 4, 8)),
    ("ConvLocal", {"features": 4, "kernel_size": (3,), "padding": "VALID"}, (2, 6, 8)),
    ("ConvTranspose", {"features": 4, "kernel_size": (3,)}, (2, 6, 8)),
    ("MultiHeadDotProductAttention", {"num_heads": 2}, (2, 5, 16)),
)
# (model, the layers but the first)
_MODELS = (
    (Compact, {"second", "third"}),
    (Setup, {"between_0", "between_1", "last"}),
    (InSequence, {"second"}),
    (CalledTwice, {"shared"}),
    *((functools.partial(Lifted, b), {"second/dense"}) for b in LIFTED.values()),
)


class AnyModelTest(parameterized.TestCase):
    def _assert_is_as_ours(self, plain, ours, x, expected_paths):
        """Checks that `plain` in the context has the kernel gradients of `ours`."""
        variables = variables_of(plain, x)
        expected = run_model(plain, variables, x)
        with dn.intercept(POLICY) as report:
            chex.assert_trees_all_equal(shapes_of(plain, x), shapes_of(ours, x))
            actual = run_model(plain, variables, x)
            program = _program(plain, variables, x)
        reference.assert_same_bits(actual[0], expected[0])
        reference.assert_same_bits(actual[2], expected[2])
        self.assertEqual(set(paths_of(report)), expected_paths)
        self.assertEqual(changed(actual[1], expected[1]), expected_paths)
        self.assertEqual(program, _program(ours, variables, x))
        biases = {path for path in expected[1] if path.endswith("bias")}
        chex.assert_trees_all_close(
            *({path: run[1][path] for path in biases} for run in (actual, expected)),
            rtol=1e-5,
            atol=1e-5,
        )

    @parameterized.parameters(*_KINDS)
    def test_every_kind_of_layer(self, name, arguments, shape):
        names = ("query", "key", "value", "out")
        attention = getattr(nn, name) is ATTENTION
        self._assert_is_as_ours(
            OneLayer(functools.partial(getattr(nn, name), **arguments)),
            OneLayer(functools.partial(getattr(dn, name), **arguments, dropit=POLICY)),
            numbers(*shape),
            {f"layer/{part}" for part in names} if attention else {"layer"},
        )

    @parameterized.parameters(*_MODELS)
    def test_every_kind_of_model(self, model, paths):
        dense = functools.partial(dn.Dense, dropit=POLICY)
        self._assert_is_as_ours(model(), model(dense=dense), X, paths)

    def test_initialisation_is_as_without(self):
        model = OneLayer(functools.partial(nn.Einsum, (16, 8), "bc,cd->bd"))
        init = lambda: model.init(jax.random.key(0), X)  # noqa: E731
        expected = jax.jit(init)()
        with dn.intercept(POLICY):
            chex.assert_trees_all_equal(jax.jit(init)(), expected)

    def test_the_kernels_gradient_is_that_at_the_sparse_input(self):
        variables = variables_of(InSequence())
        first = variables["params"]["first"]
        hidden = jnp.tanh(X @ first["kernel"] + first["bias"])
        with dn.intercept(POLICY):
            out, gradients, _ = run_model(InSequence(), variables)
        cotangent = np.cos(np.arange(out.size)).reshape(out.shape)
        expected = reference.sparse(hidden, 0.5, 16).T @ cotangent
        chex.assert_trees_all_close(
            gradients["second/kernel"], expected, rtol=1e-4, atol=1e-5
        )


class CompiledTest(parameterized.TestCase):
    def test_a_report_of_a_symbolic_batch(self):
        (batch,) = jax.export.symbolic_shape("b")
        x = jax.ShapeDtypeStruct((batch, 32), jnp.float32)
        layer = nn.Dense(8)
        variables = layer.init(jax.random.key(0), jnp.ones((1, 32)))

        def loss(variables, x):
            return jnp.sum(layer.apply(variables, x) ** 2)

        with dn.intercept(POLICY, skip_first=False) as report:
            jax.export.export(jax.jit(jax.grad(loss)))(variables, x)
        self.assertIn("128*b", str(report))

    def test_functions_are_traced_again_on_the_other_side(self):
        variables = variables_of(Compact())
        gradient, since_inside = (
            jax.jit(gradient_of(Compact())),
            jax.jit(gradient_of(Compact())),
        )
        expected = gradient(variables)["params"]
        with dn.intercept(POLICY):
            actual = gradient(variables)["params"]
            chex.assert_trees_all_equal(since_inside(variables)["params"], actual)
        # A mean over outputs has cotangents alike, so that whole kernels differ.
        for name, same in (("first", True), ("second", False), ("third", False)):
            kernels = actual[name]["kernel"], expected[name]["kernel"]
            self.assertEqual(bool(jnp.all(kernels[0] == kernels[1])), same)
        for function in (gradient, since_inside):
            chex.assert_trees_all_equal(function(variables)["params"], expected)

    def test_contexts_share_traces_where_they_mean_the_same(self):
        traces, variables = [], shapes_of(Compact())

        @jax.jit
        def gradient(variables):
            traces.append(None)
            return gradient_of(Compact())(variables)

        for arguments, cached, count in (
            (None, 0, 1),
            ((POLICY,), 2 * BYTES, 2),
            ((DropIT(0.5),), 2 * BYTES, 2),
            ((OTHER,), 2 * OTHER_BYTES, 3),
            ((POLICY, True, "second"), BYTES, 4),
            ((POLICY, True, ["second"]), BYTES, 4),
            ((POLICY, True, None, "second"), BYTES, 5),
            ((POLICY, False), 3 * BYTES, 6),
            (None, 0, 6),
        ):
            if arguments is None:
                actual = memory.cached_bytes(gradient, variables)
            else:
                with dn.intercept(*arguments):
                    actual = memory.cached_bytes(gradient, variables)
            self.assertEqual((actual, len(traces)), (cached, count))


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(16, name="first")(x))
        x = nn.Dropout(0.5, deterministic=not self.has_rng("dropout"))(x)
        x = ATTENTION(num_heads=2, name="mix")(x)
        return nn.Einsum((16, 16), "btc,cd->btd", name="einsum")(x)


class RandomTest(parameterized.TestCase):
    def test_keys_decide(self):
        model, x, key = Noisy(), numbers(2, 4, 16), jax.random.key
        variables = variables_of(model, x)
        rngs = [{"dropout": key(0), "dropit": key(seed)} for seed in (0, 1, 0)]
        expected = run_model(model, variables, x, rngs=rngs[0])
        with dn.intercept(_RANDOM) as report:
            run = runner(model)
            one, other, same = (run(variables, x, each) for each in rngs)
        for out, _, of_x in (one, other):  # dropout is as without
            reference.assert_same_bits(out, expected[0])
            reference.assert_same_bits(of_x, expected[2])
        chex.assert_trees_all_equal(same, one)
        self.assertLen(report.layers, 5)
        self.assertEqual(changed(one[1], expected[1]), set(paths_of(report)))
        self.assertEqual(changed(other[1], one[1]), set(paths_of(report)))

    def test_a_missing_key_is_told_with_the_policy(self):
        with dn.intercept(_RANDOM):
            shapes_of(Compact())  # no gradient, no key
            with pytest.raises(
                ValueError, match=r"strategy='random'.*rngs=\{'dropit': key\}"
            ):
                bytes_cached(Compact())

    def test_without_a_gradient_the_input_need_not_suit_the_policy(self):
        # Means of a channel take several positions, which there are not.
        with dn.intercept(DropIT(0.5, fill="mean")):
            shapes_of(Compact())
            with pytest.raises(ValueError, match="fill='mean'"):
                bytes_cached(Compact())


class Replaced(nn.Dense):
    """A layer of its own, though its parameters are those of Dense."""

    @nn.compact
    def __call__(self, inputs):
        kernel = self.param("kernel", self.kernel_init, (16, self.features))
        return jnp.sin(inputs @ kernel)


class Extended(nn.Dense):
    @nn.compact
    def __call__(self, inputs):
        return jnp.sin(super().__call__(2 * inputs))


class UsersLayersTest(parameterized.TestCase):
    def test_products_with_a_state_are_left_alone(self):
        fp8 = {"dot_general_cls": nn.Fp8DirectDotGeneralOp}
        model = OneLayer(functools.partial(nn.Dense, 16, **fp8))
        with dn.intercept(POLICY) as report:
            jax.eval_shape(model.init, jax.random.key(0), X)
        self.assertEmpty(report.layers)
        layer = dn.Dense(16, dropit=POLICY, **fp8)
        with pytest.raises(TypeError, match=r"dot_general_cls=.*Fp8DirectDotGeneralOp"):
            layer.init(jax.random.key(0), X)

    def test_a_call_of_its_own_is_left_alone_until_it_calls_flaxs(self):
        with dn.intercept(POLICY) as report:
            self.assertEqual(bytes_cached(OneLayer(functools.partial(Replaced, 8))), 0)
            self.assertEmpty(report.layers)
            self.assertEqual(
                bytes_cached(OneLayer(functools.partial(Extended, 8))), BYTES
            )
        self.assertEqual([layer.kind for layer in report.layers], ["Extended"])

    @parameterized.parameters("dot_general", "dot_general_cls")
    def test_a_product_of_its_own_is_kept(self, hook):
        def halved(*args, **kwargs):
            return 0.5 * lax.dot_general(*args, **kwargs)

        mine = {hook: halved if hook == "dot_general" else lambda: halved}
        model = OneLayer(functools.partial(nn.Dense, 8, **mine))
        plain = OneLayer(functools.partial(nn.Dense, 8))
        expected = run_model(model, variables := variables_of(model))
        with dn.intercept(POLICY) as report:
            out, gradients, of_x = run_model(model, variables)
            of_plain = run_model(plain, variables)[1]
        self.assertEqual(paths_of(report), ["layer"])
        reference.assert_same_bits(out, expected[0])
        reference.assert_same_bits(of_x, expected[2])
        kernels = (run["layer/kernel"] for run in (gradients, of_plain))
        reference.assert_same_bits(next(kernels), 0.5 * next(kernels))


if __name__ == "__main__":
    absltest.main()
