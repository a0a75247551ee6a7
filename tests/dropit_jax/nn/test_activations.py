import functools
import itertools
import re
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax.sharding import AxisType, PartitionSpec

import dropit_jax
from dropit_jax.xla import cpu_calls
from tests.dropit_jax import pullbacks, reference

_SHAPES = ((), (7,), (3, 10), (2, 3, 16), (2, 5, 5, 3), (4, 0))
_DTYPES = ("float32", "bfloat16", "float16")
# Every shape in 32 bits, and in one of the types of 16.
_ARRAYS = tuple(
    (shape, dtype)
    for i, shape in enumerate(_SHAPES)
    for dtype in (_DTYPES[0], _DTYPES[1 + i % 2])
)

# (ours, JAX's)
_EXACT = {
    "relu": (dropit_jax.nn.relu, jax.nn.relu),
    "relu6": (dropit_jax.nn.relu6, jax.nn.relu6),
    "leaky_relu": (dropit_jax.nn.leaky_relu, jax.nn.leaky_relu),
    "leaky_relu_0.2": (
        functools.partial(dropit_jax.nn.leaky_relu, negative_slope=0.2),
        functools.partial(jax.nn.leaky_relu, negative_slope=0.2),
    ),
}
# (ours, JAX's, the bound of the derivative's error that the docstring states)
_NEAR = {
    "gelu": (dropit_jax.nn.gelu, jax.nn.gelu, 1 / 400),
    "gelu_erf": (
        functools.partial(dropit_jax.nn.gelu, approximate=False),
        functools.partial(jax.nn.gelu, approximate=False),
        1 / 400,
    ),
    "silu": (dropit_jax.nn.silu, jax.nn.silu, 1 / 400),
    "swish": (dropit_jax.nn.swish, jax.nn.swish, 1 / 400),
    "tanh": (dropit_jax.nn.tanh, jnp.tanh, 1 / 508),
    "sigmoid": (dropit_jax.nn.sigmoid, jax.nn.sigmoid, 1 / 2032),
}


def _derivative(fn, x):
    return pullbacks.value_and_pullback(fn, x, jnp.ones_like(x))[1]


def _each(fn):
    """The function of every array of a list: they are one program."""
    return lambda arrays: [fn(x) for x in arrays]


def _pullback_bytes(fn, shape):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    pullback = jax.eval_shape(lambda x: jax.vjp(fn, x)[1], x)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pullback))


class ExactTest(parameterized.TestCase):
    @parameterized.parameters(*_EXACT)
    def test_value_and_gradient_are_jaxs_to_the_bit(self, name):
        arrays = [reference.activation(0, *array).copy() for array in _ARRAYS]
        for x in arrays:
            if x.size > 8:
                x.flat[:3] = [0, 6, 7]
        cotangents = [reference.activation(1, *array) for array in _ARRAYS]
        actual, expected = (
            pullbacks.value_and_pullback(_each(fn), arrays, cotangents)
            for fn in _EXACT[name]
        )
        for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
            reference.assert_same_bits(a, b)

    @parameterized.product(
        name=tuple(_EXACT),
        case=(((4, 8, 8, 32), 4 * 8 * 8 * 32 // 8), ((5, 3), 5), ((), 1)),
    )
    def test_caches_one_bit_an_element(self, name, case):
        shape, nbytes = case
        cached = _pullback_bytes(_EXACT[name][0], shape)
        self.assertEqual(cached, nbytes)

    def test_a_slope_that_is_an_array_is_refused(self):
        with pytest.raises(TypeError, match="negative_slope"):
            dropit_jax.nn.leaky_relu(jnp.ones(3), jnp.float32(0.1))


class NearTest(parameterized.TestCase):
    @parameterized.parameters(*_NEAR)
    def test_value_is_jaxs_to_the_bit(self, name):
        ours, theirs, _ = _NEAR[name]
        cases = itertools.product(((), (3, 10), (4, 0)), _DTYPES)
        arrays = [reference.activation(0, *case) for case in cases]
        actual, expected = (jax.jit(_each(fn))(arrays) for fn in (ours, theirs))
        for a, b in zip(actual, expected, strict=True):
            reference.assert_same_bits(a, b)

    @parameterized.parameters("gelu", "tanh")
    def test_gradient_is_within_its_bound(self, name):
        ours, theirs, bound = _NEAR[name]
        arrays = [
            np.random.default_rng(0).normal(size=shape).astype(jnp.dtype(dtype))
            for shape, dtype in _ARRAYS
        ]
        arrays = list(map(jnp.asarray, arrays))
        ones = [np.ones_like(x) for x in arrays]
        values, gradients = pullbacks.value_and_pullback(_each(ours), arrays, ones)
        expected = pullbacks.value_and_pullback(_each(theirs), arrays, ones)
        chex.assert_trees_all_equal_shapes_and_dtypes((values, gradients), expected)
        for x, *found in zip(arrays, values, gradients, *expected, strict=True):
            rounding = 4 * float(jnp.finfo(x.dtype).eps)
            value, gradient, its_value, its_gradient = (
                np.asarray(each, np.float64) for each in found
            )
            np.testing.assert_allclose(value, its_value, rtol=rounding, atol=rounding)
            np.testing.assert_allclose(gradient, its_gradient, atol=bound + rounding)

    @parameterized.parameters(*_NEAR)
    def test_derivative_is_within_its_bound(self, name):
        ours, theirs, bound = _NEAR[name]
        x = jnp.linspace(-12, 12, 100_001, dtype=jnp.float32)
        actual = np.asarray(_derivative(ours, x), np.float64)
        with jax.enable_x64(True):
            wide = jnp.asarray(np.asarray(x, np.float64))
            expected = np.asarray(_derivative(theirs, wide))
        error = np.abs(actual - expected)
        self.assertLessEqual(error.max(), bound + 1e-6)
        self.assertGreater(error.max(), 0.9 * bound)  # the bound is no wider than due

    @parameterized.product(name=tuple(_NEAR), dtype=("bfloat16", "float16"))
    def test_half_precision_is_no_worse_than_its_rounding(self, name, dtype):
        ours, theirs, bound = _NEAR[name]
        x = jnp.linspace(-6, 6, 4001).astype(dtype)
        actual = np.asarray(_derivative(ours, x), np.float64)
        expected = np.asarray(_derivative(theirs, x.astype(jnp.float32)), np.float64)
        rounding = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(actual, expected, atol=bound + 1.2 * rounding)

    @parameterized.parameters(
        ("gelu", 20.0, 1.0),
        ("gelu", -20.0, 0.0),
        ("gelu_erf", 20.0, 1.0),
        ("silu", 40.0, 1.0),
        ("silu", -40.0, 0.0),
        ("tanh", 0.0, 1.0),
        ("tanh", 30.0, 0.0),
        ("sigmoid", 0.0, 0.25),
        ("sigmoid", -90.0, 0.0),
    )
    def test_what_is_exact(self, name, x, expected):
        self.assertEqual(_derivative(_NEAR[name][0], jnp.float32(x)), expected)

    @parameterized.parameters(*_NEAR)
    def test_nan_surfaces(self, name):
        x = jnp.asarray([0.5, jnp.nan, -0.5])
        self.assertEqual(
            np.isnan(_derivative(_NEAR[name][0], x)).tolist(), [False, True, False]
        )

    @parameterized.product(name=tuple(_NEAR), shape=((4, 3, 10), (7,), ()))
    def test_caches_one_byte_an_element(self, name, shape):
        cached = _pullback_bytes(_NEAR[name][0], shape)
        self.assertEqual(cached, np.prod(shape, dtype=int))


class TransformationsTest(parameterized.TestCase):
    @parameterized.parameters(*_EXACT, *_NEAR)
    def test_gradients_are_those_of_the_plain_call(self, name):
        fn = (_EXACT | _NEAR)[name][0]
        x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 16)), jnp.float32)

        def loss(x):
            return jnp.sum(fn(x) ** 2)

        @jax.jit
        def mapped(x):
            gradient = jax.grad(loss)
            of_checkpoint = jax.grad(jax.checkpoint(loss))(x)
            return jax.vmap(gradient)(x), of_checkpoint, jax.lax.map(gradient, x)

        expected = jax.jit(jax.grad(loss))(x)
        for actual in mapped(x):
            chex.assert_trees_all_close(actual, expected, rtol=1e-6, atol=1e-7)

    @parameterized.parameters(*_EXACT, *_NEAR)
    def test_second_derivatives_are_jaxs_or_refused(self, name):
        ours, theirs, *_ = (_EXACT | _NEAR)[name]
        second = [jax.grad(jax.grad(lambda x, f=f: f(x) ** 2)) for f in (ours, theirs)]
        if name in _EXACT:
            for x in (-1.5, 1.5):
                self.assertEqual(*(jax.jit(each)(x) for each in second))
            return
        with pytest.raises(TypeError, match="activation has no second derivative"):
            jax.eval_shape(second[0], 0.5)

    @parameterized.product(
        name=("relu", "gelu"), axis_type=(AxisType.Auto, AxisType.Explicit)
    )
    def test_on_a_mesh_nothing_moves(self, name, axis_type):
        fn = (_EXACT | _NEAR)[name][0]
        axes = ("data", "model")
        mesh = jax.make_mesh((4, 2), axes, axis_types=(axis_type,) * 2)
        x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 5, 32)), jnp.float32)
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(fn(x)))))
        expected = jax.device_get(gradient(x))
        with jax.set_mesh(mesh):
            sharded = jax.device_put(x, PartitionSpec("data", None, "model"))
            compiled = gradient.lower(sharded).compile()
            self.assertNotRegex(compiled.as_text(), "all-|collective|reduce-scatter")
            actual = jax.device_get(compiled(sharded))
        chex.assert_trees_all_close(actual, expected, rtol=1e-6)


class CpuProgramTest(parameterized.TestCase):
    """Bit masks in programs of XLA's CPU compiler."""

    def computed(self, shape):
        """Returns how often the program computes the operand of the ReLU."""

        def step(x, cotangent):
            y, pullback = jax.vjp(lambda x: dropit_jax.nn.relu(jnp.abs(x) - 3.0), x)
            return y, pullback(cotangent)

        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        text = jax.jit(step).lower(x, x).compile().as_text()
        size = ",".join(map(str, shape))
        return len(re.findall(rf"f32\[{size}\]\S* abs\(", text))

    def test_what_is_rectified_is_computed_once(self):
        self.assertEqual(self.computed((64, 64, 16)), 1)

    @parameterized.parameters(((64, 256),), ((8, 16, 16, 64),))
    def test_bits_are_unpacked_in_the_loop_that_reads_them(self, shape):
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        pullback = jax.eval_shape(lambda x: jax.vjp(dropit_jax.nn.relu, x)[1], x)
        program = jax.jit(lambda pullback, g: pullback(g)).lower(pullback, x).compile()
        self.assertLen(re.findall("kind=kLoop", program.as_text()), 1)

    def test_and_would_not_be_if_packing_were_inlined(self):
        with mock.patch.object(cpu_calls, "not_inlined", lambda function: function):
            self.assertGreater(self.computed((64, 32, 16)), 1)


if __name__ == "__main__":
    absltest.main()
