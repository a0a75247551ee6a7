import dataclasses
import functools
import math
import re
from unittest import mock

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from dropit_jax import DropIT, compress
from dropit_jax.storage.quantization import Quantized, quantize
from dropit_jax.xla import cpu_calls
from tests.dropit_jax import reference

_SHAPES = ((1,), (7,), (3, 1), (3, 64), (2, 5, 21), (4, 130), (2, 3, 4, 16))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantize(x, bits, group_size, key=None):
    return quantize(x, bits, group_size, key)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _roundtrip(x, bits, group_size, key=None):
    """The codes, and what they stand for in float32 and in the type of x."""
    quantized = quantize(x, bits, group_size, key)
    dequantized = quantized.dequantize(jnp.float32), quantized.dequantize(x.dtype)
    return quantized, *dequantized


@functools.partial(jax.jit, static_argnums=1)
def _run(x, policy, key=None):
    """What is cached, and the activation rebuilt of it."""
    residual = compress(x, policy, key)
    return residual, residual.decompress()


def _numbers(seed, shape, kind, magnitude, dtype):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape)
    if kind == "relu":
        x = np.maximum(x, 0)
    elif kind == "far":  # from zero, for its spread
        x = np.sign(x.flat[0]) * (100 + x)
    elif kind == "constant":
        x = np.full(shape, x.flat[0])
    return np.asarray(jnp.asarray(magnitude * x, dtype))


def _dequantized(quantized, dtype):
    """The twin's, rounded to float32 and from there to the type."""
    values = reference.dequantized(quantized).astype(np.float32)
    return np.asarray(jnp.asarray(values).astype(dtype))


def _check(x, quantized, stochastic=False):
    """That codes cover their group, in no wider steps than they need, and are nearest.

    What may be missing to that is the rounding of float32, in which codes are computed.
    """
    levels = 2**quantized.bits - 1
    flat = np.asarray(x, np.float64).reshape(-1)
    rebuilt = reference.dequantized(quantized).reshape(-1)
    groups = reference.chunks(x.shape, quantized.group_size)
    minima = np.asarray(quantized.minimum, np.float64).reshape(-1)
    scales = np.asarray(quantized.scale, np.float64).reshape(-1)
    for group, minimum, scale in zip(groups, minima, scales, strict=True):
        low, high = flat[group].min(), flat[group].max()
        slack = 2.0**-22 * max(abs(low), abs(high)) + levels * 2.0**-126
        assert minimum <= low
        assert minimum >= low - 2.0**-7 * abs(low)
        assert minimum + levels * scale >= high - slack
        assert levels * scale <= (high - minimum) * (1 + 2.0**-7) + slack
        error = np.abs(rebuilt[group] - flat[group])
        limit = scale * ((1 if stochastic else 0.5) + 2.0**-14) + slack
        assert error.max() <= limit, (error.max(), scale)


def _stored_bytes(shape, bits, group_size):
    """Bytes of the codes, and 4 of each group."""
    codes = reference.packed_bytes(shape, group_size, math.prod(shape), bits)
    return codes + 4 * len(reference.chunks(shape, group_size))


class QuantizeTest(parameterized.TestCase):
    @hypothesis.given(
        shape=st.sampled_from(_SHAPES),
        group_size=st.sampled_from((1, 3, 16, 64, 1000)),
        bits=st.sampled_from((2, 4, 8)),
        dtype=st.sampled_from(("float32", "bfloat16", "float16")),
        kind=st.sampled_from(("normal", "relu", "far", "constant")),
        exponent=st.floats(-30, 30),
        stochastic=st.booleans(),
        seed=st.integers(0, 2**16),
    )
    @hypothesis.settings(max_examples=14)
    def test_codes_cover_their_group_and_are_nearest(
        self, shape, group_size, bits, dtype, kind, exponent, stochastic, seed
    ):
        if dtype == "float16":
            exponent = exponent / 30 - 2
        x = _numbers(seed, shape, kind, 10.0**exponent, dtype)
        key = jax.random.key(seed) if stochastic else None
        quantized, wide, same = _roundtrip(x, bits, group_size, key)
        _check(x, quantized, stochastic)
        reference.assert_same_bits(wide, _dequantized(quantized, jnp.float32))
        reference.assert_same_bits(same, _dequantized(quantized, dtype))
        held = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(quantized))
        self.assertEqual(held, _stored_bytes(shape, bits, group_size))

    @parameterized.parameters(
        # shape, bits, group size -> shapes of codes and of scales
        ((4, 128), 8, 64, (4, 128), (4, 2)),
        ((4, 128), 4, 64, (4, 64), (4, 2)),
        ((4, 128), 2, 64, (4, 32), (4, 2)),
        ((4, 3, 64), 2, 64, (4, 3, 16), (4, 3, 1)),
        ((2, 5, 21), 4, 64, (2, 53), (2, 2)),  # 105 codes and a shorter group
        ((2, 5, 21), 2, 64, (2, 27), (2, 2)),
        ((2, 3), 2, 64, (2, 1), (2, 1)),
        ((7,), 4, 3, (4,), (3,)),
    )
    def test_storage(self, shape, bits, group_size, codes, scales):
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        quantized = jax.eval_shape(lambda x: quantize(x, bits, group_size), x)
        chex.assert_type(quantized.codes, jnp.uint8)
        chex.assert_type([quantized.minimum, quantized.scale], jnp.bfloat16)
        chex.assert_shape(quantized.codes, codes)
        chex.assert_shape([quantized.minimum, quantized.scale], scales)

    @parameterized.product(bits=(2, 4, 8), dtype=("float32", "bfloat16"))
    def test_constants_round_to_themselves(self, bits, dtype):
        # Each is its own group of one, and a group of many; bfloat16 has them exactly.
        constants = [0, 1, -1, 3, 0.10009765625, -255, 1024, 2.0**-10, -1.9921875]
        x = np.repeat(np.array(constants, np.float32), 8).reshape(-1, 8)
        for group_size in (1, 8):
            rebuilt = _roundtrip(jnp.asarray(x, dtype), bits, group_size)[1]
            reference.assert_same_bits(
                np.asarray(rebuilt.astype(jnp.bfloat16), np.float32), x
            )

    @parameterized.parameters(2, 4, 8)
    def test_zeros_stay_zeros(self, bits):
        x = np.maximum(_numbers(0, (4, 100), "normal", 1.0, "float32"), 0)
        x[1] = 0
        rebuilt = np.asarray(_roundtrip(x, bits, 16)[1])
        np.testing.assert_array_equal(rebuilt[x == 0], 0)
        self.assertTrue((rebuilt[x > x.max() / 2] > 0).all())

    def test_groups_do_not_cross_samples(self):
        x = np.ones((3, 40), np.float32) * np.array([[1.0], [1e6], [-1e3]], np.float32)
        rebuilt = _roundtrip(x, 2, 64)[1]
        np.testing.assert_allclose(rebuilt, x, rtol=2.0**-8)

    @parameterized.product(bad=(np.nan, np.inf, -np.inf), bits=(2, 8))
    def test_what_is_not_finite_stays_in_its_group(self, bad, bits):
        x = _numbers(0, (2, 2, 24), "normal", 1.0, "float32")
        poisoned = x.copy()
        poisoned[0, 1, 3] = bad
        clean, rebuilt = (
            np.array(_roundtrip(array, bits, 12)[1]) for array in (x, poisoned)
        )
        self.assertFalse(np.isfinite(rebuilt[0, 1, :12]).any())
        rebuilt[0, 1, :12] = clean[0, 1, :12]
        reference.assert_same_bits(rebuilt, clean)

    @parameterized.parameters(2, 4, 8)
    def test_the_largest_float16_stays_finite(self, bits):
        largest = float(np.finfo(np.float16).max)
        x = np.array([[0, largest], [-largest, largest], [1, 65000]], np.float16)
        rebuilt = np.asarray(_roundtrip(x, bits, 64)[2], np.float64)
        self.assertTrue(np.isfinite(rebuilt).all())
        np.testing.assert_allclose(rebuilt, x, atol=2 * largest / (2**bits - 1))

    @parameterized.parameters((4, 0), (0, 16), (0,))
    def test_nothing_to_store(self, *shape):
        quantized = quantize(jnp.zeros(shape), 4, 64)
        chex.assert_shape(quantized.dequantize(jnp.float32), shape)

    def test_leaves_are_what_is_stored(self):
        quantized = quantize(jnp.ones((3, 40)), 4, 16)
        self.assertLen(jax.tree.leaves(quantized), 3)

        @jax.jit
        @jax.vmap
        def roundtrip(x):
            return quantize(x, 4, 16).dequantize(jnp.float32)

        x = _numbers(0, (2, 3, 40), "normal", 1.0, "float32")
        each = [_roundtrip(sample, 4, 16)[1] for sample in x]
        chex.assert_trees_all_equal(roundtrip(x), jnp.stack(each))


class StochasticTest(parameterized.TestCase):
    def test_the_key_decides(self):
        x = _numbers(0, (3, 50), "normal", 1.0, "float32")
        one, other = jax.random.split(jax.random.key(0))
        quantized = _quantize(x, 4, 16, one)
        chex.assert_trees_all_equal(quantized, _quantize(x, 4, 16, one))
        unjitted = quantize(jnp.asarray(x), 4, 16, one)
        chex.assert_trees_all_equal(quantized, unjitted)
        different = _quantize(x, 4, 16, other)
        self.assertFalse(np.array_equal(quantized.codes, different.codes))
        chex.assert_trees_all_equal(quantized.scale, different.scale)

    @parameterized.parameters((2, "normal"), (4, "relu"), (8, "far"))
    def test_is_unbiased(self, bits, kind):
        x, count = _numbers(0, (3, 50), kind, 1.0, "float32"), 2000

        @jax.jit
        @jax.vmap
        def roundtrip(key):
            quantized = quantize(jnp.asarray(x), bits, 16, key)
            return quantized.dequantize(jnp.float32)

        quantized = _quantize(x, bits, 16)
        steps, share = np.zeros(x.size), np.zeros(x.size)
        for group, minimum, scale in zip(
            reference.chunks(x.shape, 16),
            np.asarray(quantized.minimum, np.float64).reshape(-1),
            np.asarray(quantized.scale, np.float64).reshape(-1),
            strict=True,
        ):
            if scale == 0:  # all zeros
                continue
            steps[group] = scale
            # How far an element is beyond a code is how often the next is taken.
            share[group] = (x.reshape(-1)[group] - minimum) / scale % 1
        steps, share = steps.reshape(x.shape), share.reshape(x.shape)
        every = np.asarray(roundtrip(jax.random.split(jax.random.key(1), count)))
        error = steps * np.sqrt(share * (1 - share) / count)
        bias = every.mean(axis=0, dtype=np.float64) - x
        np.testing.assert_array_less(np.abs(bias), 5 * error + 2e-3 * steps + 1e-9)
        # Rounding to nearest is biased, by up to half a step.
        nearest = reference.dequantized(quantized) - x
        self.assertGreater((np.abs(nearest) - 0.4 * steps).max(), 0)

    def test_elements_round_independently(self):
        # Between two codes: 0 and 1 are the range of every group.
        x = np.full((100, 64), 0.5, np.float32)
        x[:, 0], x[:, 1] = 0, 1
        quantized = _quantize(x, 2, 64, jax.random.key(0))
        up = reference.dequantized(quantized)[:, 2:] > 0.5
        for axis in (0, 1):
            deviation = up.mean(axis=axis) - up.mean()
            limit = 5 * np.sqrt(0.25 / up.shape[axis])
            self.assertLess(np.abs(deviation).max(), limit)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _run_each(x, policy, value_dtypes, key=None):
    """What `_run` gives for several types of values, compiled at once."""
    return [
        _run(x, dataclasses.replace(policy, value_dtype=value_dtype), key)
        for value_dtype in (None, *value_dtypes)
    ]


_RANDOM = {"strategy": "random", "chunk_size": 10}
_VALUE_DTYPES = ("bfloat16", "float16", "int8", "int4", "int2")
# Every selection with a float and a code, and a few with all.
_SELECTIONS = (
    (_VALUE_DTYPES, {"chunk_size": 16, "encoding": "index"}),
    (("float16", "int8"), {"chunk_size": None, "encoding": "index"}),
    (("bfloat16", "int2"), {**_RANDOM, "encoding": "index"}),
    (("float16", "int4"), {"chunk_size": 16, "encoding": "bitmap"}),
    (("bfloat16", "int2"), {"chunk_size": None, "encoding": "bitmap"}),
    (("float16", "int8"), {**_RANDOM, "encoding": "bitmap"}),
    (_VALUE_DTYPES, {"granularity": "channel"}),
    (("bfloat16", "int4"), {"granularity": "channel", "strategy": "random"}),
)


class PolicyTest(parameterized.TestCase):
    @parameterized.parameters(*_SELECTIONS)
    def test_what_is_kept_is_stored_in_few_bits(self, value_dtypes, fields):
        x, key = _numbers(0, (2, 3, 33), "normal", 1.0, "float32"), jax.random.key(0)
        policy = DropIT(0.5, **fields, group_size=20)
        kept, *stored = _run_each(x, policy, value_dtypes, key)
        for residual, rebuilt in stored:
            with self.subTest(residual.dropit.value_dtype):
                self._assert_stored(residual, rebuilt, kept[0])

    def _assert_stored(self, residual, rebuilt, kept):
        """That a residual holds the values and positions of another in fewer bits."""
        chex.assert_trees_all_equal(residual.positions, kept.positions)
        values, expected = residual.values, kept.positions.nbytes
        bits, value_dtype = residual.dropit.code_bits, residual.dropit.value_dtype
        if bits is None:
            chex.assert_trees_all_equal(values, kept.values.astype(value_dtype))
            expected += 2 * values.size
            values = values.astype(jnp.float32)
        else:
            self.assertEqual((values.bits, values.group_size), (bits, 20))
            _check(kept.values, values)
            expected += _stored_bytes(kept.values.shape, bits, 20)
            values = _dequantized(values, jnp.float32)
        self.assertEqual(residual.nbytes, expected)
        placed = dataclasses.replace(kept, values=jnp.asarray(values)).decompress()
        reference.assert_same_bits(rebuilt, placed)

    @parameterized.parameters("float32", "bfloat16", "float16")
    def test_everything_kept_in_few_bits(self, dtype):
        x = _numbers(0, (2, 5, 21), "relu", 1.0, dtype)
        for residual, rebuilt in _run_each(x, DropIT(0.0), _VALUE_DTYPES)[1:]:
            self.assertIsNone(residual.positions)
            bits = residual.dropit.code_bits
            if bits is None:
                continue
            self.assertIsInstance(residual.values, Quantized)
            self.assertEqual(residual.nbytes, _stored_bytes(x.shape, bits, 64))
            _check(x, residual.values)
            reference.assert_same_bits(rebuilt, _dequantized(residual.values, dtype))

    @parameterized.parameters(0.0, 0.5)
    def test_stochastic_rounding(self, rate):
        x = _numbers(0, (4, 64), "normal", 1.0, "float32")
        policy = DropIT(rate, value_dtype="int4", rounding="stochastic")
        one, other = jax.random.split(jax.random.key(0))
        residual, _ = _run(x, policy, one)
        _check(_run(x, DropIT(rate))[0].values, residual.values, stochastic=True)
        different, _ = _run(x, policy, other)
        chex.assert_trees_all_equal(residual.positions, different.positions)
        self.assertFalse(np.array_equal(residual.values.codes, different.values.codes))
        chex.assert_trees_all_equal(residual, _run(x, policy, one)[0])

    def test_rounding_does_not_change_the_random_choice(self):
        x, key = _numbers(0, (4, 64), "normal", 1.0, "float32"), jax.random.key(0)
        policies = [
            DropIT(strategy="random", value_dtype="int4", rounding=rounding)
            for rounding in ("nearest", "stochastic")
        ]
        nearest, stochastic = (_run(x, policy, key)[0] for policy in policies)
        chex.assert_trees_all_equal(nearest.positions, stochastic.positions)


class CpuProgramTest(parameterized.TestCase):
    """What XLA's CPU compiler makes of a quantisation."""

    def computed(self, store):
        """How often the program computes what it stores."""

        def step(x):
            x = jnp.abs(x - 3.0)
            return x, store(x)

        x = jax.ShapeDtypeStruct((64, 64, 16), jnp.float32)
        text = jax.jit(step).lower(x).compile().as_text()
        return len(re.findall(r"f32\[64,64,16\]\S* abs\(", text))

    def test_what_is_stored_is_computed_once(self):
        self.assertEqual(self.computed(lambda x: quantize(x, 4, 64)), 1)

    def test_and_would_not_be_if_it_were_inlined(self):
        with mock.patch.object(cpu_calls, "not_inlined", lambda function: function):
            # Of another size of group, or JAX takes what it has traced.
            self.assertGreater(self.computed(lambda x: quantize(x, 4, 32)), 1)


if __name__ == "__main__":
    absltest.main()
