"""A layer computes what Flax's layer does, but for the gradient of its kernel."""

import functools

import chex
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import serialization
from flax.core import meta
from jax import lax
from jax.interpreters import partial_eval as pe

from dropit_jax import DropIT
from dropit_jax import linen as dn
from tests.dropit_jax import reference
from tests.dropit_jax.linen.layer_cases import LAYERS, POLICY, numbers, variables_of


def _cases():
    for name, cases in LAYERS.items():
        for arguments, shape in cases:
            yield name, arguments, shape


def _run(layer, variables, x):
    """Output, and the gradients of the variables and of the input."""
    out, pullback = jax.vjp(layer.apply, variables, x)
    cotangent = jnp.cos(jnp.arange(out.size)).reshape(out.shape)
    return out, *pullback(cotangent.astype(out.dtype))


def _initialisation(layer, x):
    """The program that draws the variables, and their structure."""
    program, variables = jax.make_jaxpr(layer.init, return_shape=True)(
        jax.random.key(0), x
    )
    jaxpr = program.jaxpr
    drawn, _ = pe.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    return str(drawn), program.consts, variables


class LayerTest(parameterized.TestCase):
    @parameterized.parameters(*_cases())
    def test_is_flaxs_layer_but_for_the_kernels_gradient(self, name, arguments, shape):
        x = numbers(shape)
        theirs = getattr(nn, name)(**arguments)
        ours = getattr(dn, name)(**arguments, dropit=POLICY)
        self.assertEqual(_initialisation(ours, x), _initialisation(theirs, x))
        variables = variables_of(theirs, x)
        exact = getattr(dn, name)(**arguments, dropit=DropIT(0.0))
        expected = jax.jit(functools.partial(_run, theirs))(variables, x)
        actual, at_rate_zero = jax.jit(
            lambda *args: (_run(ours, *args), _run(exact, *args))
        )(variables, x)
        reference.assert_same_bits(actual[0], expected[0])
        reference.assert_same_bits(actual[2], expected[2])
        theirs, ours = (meta.unbox(g[1]["params"]) for g in (expected, actual))
        if "bias" in theirs:
            reference.assert_same_bits(ours["bias"], theirs["bias"])
        difference = np.subtract(ours["kernel"], theirs["kernel"], dtype=np.float32)
        self.assertGreater(np.abs(difference).max(), 0)
        chex.assert_trees_all_close(at_rate_zero, expected, rtol=1e-6, atol=1e-6)

    @parameterized.parameters(
        ("Dense", {"features": 8}, (3, 5, 21), (0, 1, 2)),
        ("DenseGeneral", {"features": 8, "axis": (1, 2)}, (3, 5, 4, 6), (0, 3, 1, 2)),
        ("DenseGeneral", {"features": 8, "batch_dims": (0,)}, (3, 5, 21), (0, 1, 2)),
        (
            "Einsum",
            {"shape": (5, 6, 8), "einsum_str": "hbd,hde->be"},
            (5, 3, 6),
            (1, 0, 2),
        ),
        ("Conv", {"features": 8, "kernel_size": (3, 3)}, (2, 5, 6, 5), range(4)),
        ("ConvLocal", {"features": 8, "kernel_size": (3, 3)}, (2, 5, 6, 5), range(4)),
        (
            "ConvTranspose",
            {"features": 8, "kernel_size": (3, 3), "strides": (2, 2)},
            (2, 5, 6, 5),
            range(4),
        ),
    )
    def test_kernels_gradient_is_flaxs_at_the_sparse_input(
        self, name, arguments, shape, order
    ):
        # `order`: of the axes in which a sample is cut; what is summed over comes last.
        x = numbers(shape)
        theirs = getattr(nn, name)(**arguments)
        ours = getattr(dn, name)(**arguments, dropit=POLICY)
        variables = variables_of(theirs, x)
        sparse = reference.sparse(np.transpose(x, order), 0.5, 16)
        sparse = jnp.asarray(np.transpose(sparse, np.argsort(order)))
        run = jax.jit(_run, static_argnums=0)
        chex.assert_trees_all_close(
            run(ours, variables, x)[1]["params"]["kernel"],
            run(theirs, variables, sparse)[1]["params"]["kernel"],
            rtol=1e-5,
            atol=1e-5,
        )

    @parameterized.parameters(*((name, *cases[0]) for name, cases in LAYERS.items()))
    def test_without_a_policy_it_is_flaxs_layer(self, name, arguments, shape):
        x = numbers(shape)
        theirs = getattr(nn, name)(**arguments)
        ours = getattr(dn, name)(**arguments)
        variables = variables_of(theirs, x)
        programs = [
            str(
                jax.make_jaxpr(jax.grad(lambda v, x, m=m: m.apply(v, x).sum()))(
                    variables, x
                )
            )
            for m in (theirs, ours)
        ]
        self.assertEqual(*programs)

    @parameterized.parameters(
        *LAYERS, "MultiHeadDotProductAttention", "MultiHeadAttention", "SelfAttention"
    )
    def test_every_attribute_of_flaxs_layer_is_there(self, name):
        theirs, ours = (getattr(module, name) for module in (nn, dn))
        names = list(theirs.__dataclass_fields__)
        self.assertEqual([n for n in ours.__dataclass_fields__ if n != "dropit"], names)

    def test_an_equation_may_come_with_the_call(self):
        x = numbers((4, 16))
        theirs = nn.Einsum((16, 8))
        ours = dn.Einsum((16, 8), dropit=POLICY)
        variables = theirs.init(jax.random.key(0), x, "bd,dh->bh")
        chex.assert_trees_all_equal(
            ours.init(jax.random.key(0), x, "bd,dh->bh"), variables
        )
        reference.assert_same_bits(
            ours.apply(variables, x, "bd,dh->bh"),
            theirs.apply(variables, x, einsum_str="bd,dh->bh"),
        )

    def test_hooks_are_put_back(self):
        layer = dn.Dense(4, dropit=POLICY, dot_general=lax.dot_general)
        x = numbers((2, 16))
        bound = layer.bind(layer.init(jax.random.key(0), x))
        bound(x)
        self.assertIs(bound.dot_general, lax.dot_general)
        self.assertIsNone(bound.dot_general_cls)
        with pytest.raises(flax.errors.ScopeParamShapeError):
            bound(numbers((2, 17)))
        self.assertIs(bound.dot_general, lax.dot_general)

    def test_an_array_of_integers_is_promoted_as_in_flax(self):
        x = jnp.arange(32).reshape(2, 16)
        layer = dn.Dense(4, dropit=POLICY)
        variables = layer.init(jax.random.key(0), x)
        reference.assert_same_bits(
            layer.apply(variables, x), nn.Dense(4).apply(variables, x)
        )


class Network(nn.Module):
    dense: type = nn.Dense
    conv: type = nn.Conv

    @nn.compact
    def __call__(self, x):
        x = nn.relu(self.conv(16, (3, 3), name="first")(x))
        x = nn.relu(self.conv(16, (3, 3), strides=2)(x))
        x = nn.BatchNorm(use_running_average=True)(x)
        return self.dense(5)(x.mean((1, 2)))


class ModelTest(parameterized.TestCase):
    def test_a_checkpoint_of_flaxs_model_loads_unchanged(self):
        x = numbers((2, 8, 8, 3))
        theirs = Network()
        ours = Network(
            functools.partial(dn.Dense, dropit=POLICY),
            functools.partial(dn.Conv, dropit=POLICY),
        )
        variables = variables_of(theirs, x)
        saved = serialization.to_bytes(variables)
        shapes = jax.eval_shape(ours.init, jax.random.key(2), x)
        template = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
        loaded = serialization.from_bytes(template, saved)
        chex.assert_trees_all_equal(loaded, variables)
        reference.assert_same_bits(
            jax.jit(ours.apply)(loaded, x), jax.jit(theirs.apply)(variables, x)
        )


if __name__ == "__main__":
    absltest.main()
