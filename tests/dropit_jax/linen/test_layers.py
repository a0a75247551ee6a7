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

_POLICY = DropIT(0.5)

_MASK = np.broadcast_to(np.eye(3)[..., None, None], (3, 3, 16, 8))

# (layer, its arguments, input shape): what Flax documents.
_PARTITIONED = nn.with_partitioning(
    nn.initializers.lecun_normal(), (None, None, "x", "y")
)

# Options that do not meet in the code of a layer share a case.
_DENSES = (
    (
        {
            "features": 8,
            "use_bias": False,
            "precision": lax.Precision.HIGHEST,
            "dot_general": functools.partial(lax.dot_general),
        },
        (2, 3, 5, 32),
    ),
    ({"features": 8, "param_dtype": jnp.bfloat16}, (32,)),
    (
        {
            "features": 8,
            "dtype": jnp.bfloat16,
            "dot_general_cls": lambda: lax.dot_general,
        },
        (4, 32),
    ),
    ({"features": 8, "kernel_init": nn.initializers.ones_init()}, (4, 21)),
    (
        {
            "features": 8,
            "kernel_init": nn.with_partitioning(nn.initializers.normal(), ("x", None)),
            "bias_init": nn.with_partitioning(nn.initializers.normal(), ("x",)),
        },
        (4, 32),
    ),
)


def _to_half(*arrays, **_):
    return [None if array is None else array.astype(jnp.bfloat16) for array in arrays]


_TO_HALF = {"promote_dtype": _to_half}
_DENSES += (({"features": 8, **_TO_HALF}, (4, 32)),)
_DENSE_GENERALS = (
    ({"features": 8, **_TO_HALF}, (4, 32)),
    (
        {"features": (4, 2), "axis": (-2, -1), "precision": lax.Precision.HIGHEST},
        (3, 5, 4, 8),
    ),
    (
        {
            "features": 6,
            "axis": (1, -1),
            "use_bias": False,
            "dot_general": functools.partial(lax.dot_general),
        },
        (3, 5, 4, 8),
    ),
    ({"features": (4, 2), "axis": (3, 1)}, (2, 3, 5, 8)),
    (
        {
            "features": 8,
            "batch_dims": (0,),
            "dot_general_cls": lambda: lax.dot_general,
        },
        (3, 5, 16),
    ),
    ({"features": (4, 2), "axis": -1, "batch_dims": (0, 1)}, (2, 3, 5, 16)),
    ({"features": 8, "dtype": jnp.bfloat16}, (2, 5, 21)),
    ({"features": 8, "param_dtype": jnp.bfloat16, "axis": 1}, (2, 21, 3)),
    ({"features": (2, 4), "axis": (1, 2), "kernel_init": _PARTITIONED}, (3, 4, 8)),
)
_EINSUMS = (
    ({"shape": (32, 8), "einsum_str": "bd,dh->bh", **_TO_HALF}, (4, 32)),
    ({"shape": (4, 8, 6), "einsum_str": "bthd,hdf->btf"}, (2, 3, 4, 8)),
    ({"shape": (5, 6, 7), "einsum_str": "abc,cde->abde"}, (3, 4, 5)),
    ({"shape": (4, 8, 6), "einsum_str": "bhd,hde->bhe"}, (2, 4, 8)),
    ({"shape": (16, 3), "einsum_str": "...d,de->...e", "use_bias": False}, (2, 5, 16)),
    (
        {"shape": (16, 8), "einsum_str": "db, df -> bf", "param_dtype": jnp.bfloat16},
        (16, 3),
    ),
    ({"shape": (7, 6), "einsum_str": " ab c , c d - > a b d"}, (3, 4, 7)),
    ({"shape": (7, 6), "einsum_str": "abc,cd- >abd", "use_bias": False}, (3, 4, 7)),
    (
        {
            "shape": (16, 8),
            "einsum_str": "bd,df->bf",
            "precision": lax.Precision.HIGHEST,
            "preferred_element_type": jnp.float32,
            "dtype": jnp.bfloat16,
        },
        (4, 16),
    ),
    (
        {
            "shape": (16, 8),
            "einsum_str": "bd,df->bf",
            "kernel_init": nn.with_partitioning(nn.initializers.normal(), ("x", None)),
        },
        (4, 16),
    ),
)
_CONVS = (
    ({"features": 8, "kernel_size": (3, 3), **_TO_HALF}, (2, 6, 6, 16)),
    (
        {
            "features": 8,
            "kernel_size": (3, 3),
            "strides": None,
            "input_dilation": None,
            "kernel_dilation": None,
            "feature_group_count": 2,
            "conv_general_dilated": functools.partial(lax.conv_general_dilated),
        },
        (2, 6, 6, 16),
    ),
    ({"features": 8, "kernel_size": (3, 3), "use_bias": False}, (6, 6, 16)),
    ({"features": 8, "kernel_size": (3, 3)}, (2, 3, 6, 6, 16)),
    ({"features": 8, "kernel_size": 3, "padding": "CAUSAL"}, (2, 9, 16)),
    ({"features": 8, "kernel_size": (3, 3), "padding": "CIRCULAR"}, (2, 6, 6, 16)),
    ({"features": 8, "kernel_size": (3, 3), "padding": "REFLECT"}, (2, 6, 6, 16)),
    (
        {
            "features": 8,
            "kernel_size": (3, 3),
            "padding": "VALID",
            "param_dtype": jnp.float16,
        },
        (2, 6, 6, 16),
    ),
    ({"features": 8, "kernel_size": (3, 3), "padding": ((1, 2), 0)}, (2, 6, 6, 16)),
    (
        {"features": 8, "kernel_size": (3, 3), "strides": 2, "kernel_dilation": 2},
        (2, 9, 8, 16),
    ),
    (
        {"features": 8, "kernel_size": (3, 3), "input_dilation": 2, "padding": 1},
        (2, 4, 4, 16),
    ),
    ({"features": 8, "kernel_size": (2, 2, 2)}, (2, 4, 4, 4, 16)),
    ({"features": 8, "kernel_size": (1, 1), "dtype": jnp.bfloat16}, (2, 4, 4, 16)),
    ({"features": 8, "kernel_size": (3, 3), "mask": _MASK}, (2, 6, 6, 16)),
    (
        {
            "features": 8,
            "kernel_size": (3, 3),
            "conv_general_dilated_cls": lambda: lax.conv_general_dilated,
        },
        (2, 6, 6, 5),
    ),
    (
        {
            "features": 8,
            "kernel_size": (3, 3),
            "precision": lax.Precision.HIGHEST,
            "kernel_init": _PARTITIONED,
        },
        (2, 6, 6, 16),
    ),
)
_CONV_LOCALS = (
    ({"features": 4, "kernel_size": (3, 3), **_TO_HALF}, (2, 4, 4, 16)),
    (
        {
            "features": 4,
            "kernel_size": (2,),
            "mask": np.broadcast_to(np.arange(5)[:, None, None] > 1, (5, 32, 4)),
            "padding": "VALID",
            "precision": lax.Precision.HIGHEST,
            "kernel_init": nn.with_partitioning(nn.initializers.normal(), (None, "x")),
        },
        (2, 6, 16),
    ),
    ({"features": 4, "kernel_size": (3, 3), "padding": "REFLECT"}, (2, 4, 5, 16)),
    ({"features": 4, "kernel_size": (3, 3), "use_bias": False}, (5, 6, 16)),
    ({"features": 4, "kernel_size": (3, 3)}, (2, 3, 4, 4, 16)),
    ({"features": 4, "kernel_size": (3, 3), "padding": "CIRCULAR"}, (2, 4, 5, 16)),
    (
        {
            "features": 4,
            "kernel_size": 3,
            "padding": "CAUSAL",
            "param_dtype": jnp.bfloat16,
        },
        (2, 9, 16),
    ),
    (
        {"features": 4, "kernel_size": (3, 3), "strides": 2, "kernel_dilation": 2},
        (2, 9, 8, 5),
    ),
    (
        {
            "features": 4,
            "kernel_size": (2, 2),
            "padding": "VALID",
            "dtype": jnp.bfloat16,
        },
        (2, 4, 5, 16),
    ),
)
_CONV_TRANSPOSES = (
    ({"features": 8, "kernel_size": (3, 3), **_TO_HALF}, (2, 5, 6, 16)),
    (
        {
            "features": 8,
            "kernel_size": (3, 3),
            "dtype": jnp.bfloat16,
            "preferred_element_type": jnp.float32,
        },
        (2, 5, 6, 16),
    ),
    ({"features": 8, "kernel_size": (3, 3), "use_bias": False}, (5, 6, 16)),
    ({"features": 8, "kernel_size": (3, 3)}, (2, 3, 4, 4, 16)),
    ({"features": 8, "kernel_size": (3, 3), "strides": (2, 2)}, (2, 4, 5, 16)),
    (
        {"features": 8, "kernel_size": (4, 4), "strides": (2, 2), "padding": "VALID"},
        (2, 4, 4, 16),
    ),
    (
        {
            "features": 8,
            "kernel_size": (3, 3),
            "strides": (2, 2),
            "padding": "CIRCULAR",
        },
        (2, 4, 4, 16),
    ),
    (
        {"features": 8, "kernel_size": (3, 3), "padding": ((1, 2), (0, 1))},
        (2, 4, 4, 16),
    ),
    (
        {
            "features": 8,
            "kernel_size": 3,
            "padding": 1,
            "param_dtype": jnp.bfloat16,
        },
        (2, 9, 16),
    ),
    (
        {
            "features": 16,
            "kernel_size": (3, 3),
            "kernel_dilation": (2, 2),
            "transpose_kernel": True,
        },
        (2, 5, 5, 5),
    ),
    (
        {
            "features": 8,
            "kernel_size": (3, 3),
            "mask": _MASK,
            "precision": lax.Precision.HIGHEST,
            "kernel_init": _PARTITIONED,
        },
        (2, 4, 4, 16),
    ),
)
_LAYERS = {
    "Dense": _DENSES,
    "DenseGeneral": _DENSE_GENERALS,
    "Einsum": _EINSUMS,
    "Conv": _CONVS,
    "ConvLocal": _CONV_LOCALS,
    "ConvTranspose": _CONV_TRANSPOSES,
}


def _cases():
    for name, cases in _LAYERS.items():
        for arguments, shape in cases:
            yield name, arguments, shape


def _input(shape):
    x = np.random.default_rng(0).normal(size=shape)
    return jnp.asarray(np.round(x, 1), jnp.float32)  # with ties


def _run(layer, variables, x):
    """Output, and the gradients of the variables and of the input."""
    out, pullback = jax.vjp(layer.apply, variables, x)
    cotangent = jnp.cos(jnp.arange(out.size)).reshape(out.shape)
    return out, *pullback(cotangent.astype(out.dtype))


def _variables(layer, x):
    """Variables of an initialisation's types, which need not be compiled."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 4, leaf.dtype),
        jax.eval_shape(layer.init, jax.random.key(0), x),
    )


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
        x = _input(shape)
        theirs = getattr(nn, name)(**arguments)
        ours = getattr(dn, name)(**arguments, dropit=_POLICY)
        self.assertEqual(_initialisation(ours, x), _initialisation(theirs, x))
        variables = _variables(theirs, x)
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
        x = _input(shape)
        theirs = getattr(nn, name)(**arguments)
        ours = getattr(dn, name)(**arguments, dropit=_POLICY)
        variables = _variables(theirs, x)
        sparse = reference.sparse(np.transpose(x, order), 0.5, 16)
        sparse = jnp.asarray(np.transpose(sparse, np.argsort(order)))
        run = jax.jit(_run, static_argnums=0)
        chex.assert_trees_all_close(
            run(ours, variables, x)[1]["params"]["kernel"],
            run(theirs, variables, sparse)[1]["params"]["kernel"],
            rtol=1e-5,
            atol=1e-5,
        )

    @parameterized.parameters(*((name, *cases[0]) for name, cases in _LAYERS.items()))
    def test_without_a_policy_it_is_flaxs_layer(self, name, arguments, shape):
        x = _input(shape)
        theirs = getattr(nn, name)(**arguments)
        ours = getattr(dn, name)(**arguments)
        variables = _variables(theirs, x)
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
        *_LAYERS, "MultiHeadDotProductAttention", "MultiHeadAttention", "SelfAttention"
    )
    def test_every_attribute_of_flaxs_layer_is_there(self, name):
        theirs, ours = (getattr(module, name) for module in (nn, dn))
        names = list(theirs.__dataclass_fields__)
        self.assertEqual([n for n in ours.__dataclass_fields__ if n != "dropit"], names)

    def test_an_equation_may_come_with_the_call(self):
        x = _input((4, 16))
        theirs = nn.Einsum((16, 8))
        ours = dn.Einsum((16, 8), dropit=_POLICY)
        variables = theirs.init(jax.random.key(0), x, "bd,dh->bh")
        chex.assert_trees_all_equal(
            ours.init(jax.random.key(0), x, "bd,dh->bh"), variables
        )
        reference.assert_same_bits(
            ours.apply(variables, x, "bd,dh->bh"),
            theirs.apply(variables, x, einsum_str="bd,dh->bh"),
        )

    def test_hooks_are_put_back(self):
        layer = dn.Dense(4, dropit=_POLICY, dot_general=lax.dot_general)
        x = _input((2, 16))
        bound = layer.bind(layer.init(jax.random.key(0), x))
        bound(x)
        self.assertIs(bound.dot_general, lax.dot_general)
        self.assertIsNone(bound.dot_general_cls)
        with pytest.raises(flax.errors.ScopeParamShapeError):
            bound(_input((2, 17)))
        self.assertIs(bound.dot_general, lax.dot_general)

    def test_an_array_of_integers_is_promoted_as_in_flax(self):
        x = jnp.arange(32).reshape(2, 16)
        layer = dn.Dense(4, dropit=_POLICY)
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


class MaskTest(parameterized.TestCase):
    @parameterized.parameters(nn.ConvTranspose, nn.ConvLocal)
    def test_it_may_come_with_a_transformation(self, kind):
        # A mask of the trace that the layer is called in, and no constant.
        x = _input((2, 4, 3))
        make = functools.partial(kind, 4, (3,), padding="VALID")
        variables = _variables(make(), x)
        shape = variables["params"]["kernel"].shape
        masks = jnp.asarray(np.random.default_rng(0).random((2, *shape)) > 0.5)

        def gradient(layer, mask):
            def loss(variables):
                return jnp.sum(
                    layer(4, (3,), padding="VALID", mask=mask).apply(variables, x)
                )

            return jax.grad(loss)(variables)

        ours = functools.partial(getattr(dn, kind.__name__), dropit=DropIT(0.0))
        chex.assert_trees_all_close(
            jax.jit(jax.vmap(functools.partial(gradient, ours)))(masks),
            jax.jit(jax.vmap(functools.partial(gradient, kind)))(masks),
            rtol=1e-6,
        )


class ModelTest(parameterized.TestCase):
    def test_a_checkpoint_of_flaxs_model_loads_unchanged(self):
        x = _input((2, 8, 8, 3))
        theirs = Network()
        ours = Network(
            functools.partial(dn.Dense, dropit=_POLICY),
            functools.partial(dn.Conv, dropit=_POLICY),
        )
        variables = _variables(theirs, x)
        saved = serialization.to_bytes(variables)
        shapes = jax.eval_shape(ours.init, jax.random.key(2), x)
        template = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
        loaded = serialization.from_bytes(template, saved)
        chex.assert_trees_all_equal(loaded, variables)
        reference.assert_same_bits(
            jax.jit(ours.apply)(loaded, x), jax.jit(theirs.apply)(variables, x)
        )


class TransformationsTest(parameterized.TestCase):
    def _gradients(self, dense, lift):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.tanh(dense(16, name="dense")(x)), None

        class Stack(nn.Module):
            @nn.compact
            def __call__(self, x):
                return lift(Layer)(name="layers")(x, None)[0]

        x = _input((4, 16))
        variables = _variables(Stack(), x)
        loss = lambda v: jnp.sum(Stack().apply(v, x))  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(variables)

    @parameterized.named_parameters(
        (
            "scan",
            lambda layer: nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=2,
            ),
        ),
        ("remat", nn.remat),
        (
            "remat_scan",
            lambda layer: nn.scan(
                nn.remat(layer),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=2,
            ),
        ),
        ("jit", nn.jit),
    )
    def test_flaxs_lifted_transformations(self, lift):
        plain = self._gradients(nn.Dense, lift)
        exact = functools.partial(dn.Dense, dropit=DropIT(0.0))
        chex.assert_trees_all_close(self._gradients(exact, lift), plain, rtol=1e-5)
        dropped = functools.partial(dn.Dense, dropit=_POLICY)
        loss, gradients = self._gradients(dropped, lift)
        expected_loss, expected = plain
        self.assertAlmostEqual(loss, expected_loss, places=4)
        chex.assert_trees_all_equal_shapes_and_dtypes(gradients, expected)


if __name__ == "__main__":
    absltest.main()
