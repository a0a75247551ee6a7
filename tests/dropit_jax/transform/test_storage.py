"""Forms hold what they say they hold, in the bytes that they say."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from dropit_jax import DropIT, compress
from dropit_jax.transform.forms import presets
from dropit_jax.transform.forms.storage import Bits, Codes, Exact, Selected


def _roundtrip(form, x):
    aval = jax.typeof(x)

    @jax.jit
    def run(x):
        stored = form.encode(x)
        return stored, form.decode(stored, aval)

    stored, rebuilt = run(x)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(stored))
    assert held == form.nbytes(aval), (held, form.nbytes(aval))
    assert (rebuilt.shape, rebuilt.dtype) == (x.shape, x.dtype)
    return np.asarray(rebuilt)


def _groups(last):
    """Where groups of the last axis begin and end."""
    size = last if last <= 128 and last % 64 else 64
    return [(i, min(i + size, last)) for i in range(0, last, size)]


class CodesTest(parameterized.TestCase):
    @hypothesis.given(
        last=st.sampled_from((1, 3, 16, 64, 100, 128, 130, 197)),
        bits=st.sampled_from((2, 4, 8)),
        dtype=st.sampled_from(("float32", "bfloat16", "float16")),
        exponent=st.floats(-4, 4),
        seed=st.integers(0, 2**16),
    )
    @hypothesis.settings(max_examples=25)
    def test_error_is_half_a_step_of_the_group(self, last, bits, dtype, exponent, seed):
        numbers = np.random.default_rng(seed).normal(size=(2, 3, last))
        scale = 10.0 ** (exponent if dtype != "float16" else exponent / 2)
        x = jnp.asarray(scale * numbers, dtype)
        rebuilt = _roundtrip(Codes(bits), x).astype(np.float64)
        exact = np.asarray(x, np.float64)
        for start, stop in _groups(last):
            group, found = exact[..., start:stop], rebuilt[..., start:stop]
            low = group.min(axis=-1, keepdims=True)
            spread = group.max(axis=-1, keepdims=True) - low
            # The minimum is rounded down to bfloat16, and the scale up.
            step = (spread + np.abs(low) * 2.0**-6) * (1 + 2.0**-6) / (2**bits - 1)
            rounding = 2.0 ** -(7 if dtype == "bfloat16" else 9) * np.abs(group)
            error = np.abs(found - group)
            self.assertTrue(np.all(error <= 0.5 * step + rounding), (error, step))

    @parameterized.parameters(np.nan, np.inf, -np.inf)
    def test_what_is_not_finite_surfaces(self, number):
        x = np.ones((2, 64), np.float32)
        x[1, 5] = number
        rebuilt = _roundtrip(Codes(8), jnp.asarray(x))
        self.assertFalse(np.isfinite(rebuilt[1]).any())
        np.testing.assert_allclose(rebuilt[0], 1, rtol=2.0**-7)

    def test_a_constant_group_is_kept(self):
        x = jnp.full((3, 64), 0.125)
        np.testing.assert_allclose(_roundtrip(Codes(4), x), x, rtol=2.0**-7)

    def test_largest_number_of_half_precision_does_not_overflow(self):
        x = jnp.asarray(np.linspace(-65504, 65504, 64), jnp.float16)
        self.assertTrue(np.isfinite(_roundtrip(Codes(8), x[None])).all())


class ExactTest(parameterized.TestCase):
    @parameterized.parameters((3, 8), (3, 13), (7,), (2, 0), (2, 3, 1))
    def test_booleans_take_a_bit(self, *shape):
        x = np.random.default_rng(0).random(shape) > 0.5
        np.testing.assert_array_equal(_roundtrip(Bits(), jnp.asarray(x)), x)

    def test_exact_is_the_value(self):
        x = jnp.arange(12.0).reshape(3, 4)
        np.testing.assert_array_equal(_roundtrip(Exact(), x), x)

    @parameterized.parameters(
        Bits(), Exact(), Codes(2), Codes(8), Selected(DropIT(0.9, fill="mean"))
    )
    def test_words_stand_for_forms(self, form):
        self.assertEqual(presets.form_of_word(presets.word(form)), form)


class SelectedTest(parameterized.TestCase):
    @parameterized.parameters(
        DropIT(0.75),
        DropIT(0.75, chunk_size=None),
        DropIT(0.75, granularity="channel"),
        DropIT(0.75, value_dtype="int8", fill="mean"),
        DropIT(0.5, "random", rounding="stochastic", value_dtype="int4"),
    )
    def test_it_holds_the_residual_of_the_policy(self, policy):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 24, 32)), jnp.float32)
        key = jax.random.key(1) if policy.needs_key else None
        form = Selected(policy)
        stored = jax.jit(form.encode)(x, key=key)
        residual = jax.jit(compress, static_argnums=1)(x, policy, key)
        self.assertEqual(form.nbytes(jax.typeof(x)), residual.nbytes)
        self.assertEqual(form.needs_key, policy.needs_key)
        np.testing.assert_array_equal(
            form.decode(stored, jax.typeof(x)), residual.decompress()
        )

    @parameterized.parameters(
        (DropIT(0.5, fill="mean"), (4, 8), "float32"),
        (DropIT(0.5), (4, 8), "float8_e4m3fn"),
    )
    def test_it_takes_no_value_that_the_policy_refuses(self, policy, shape, dtype):
        held = Selected(policy).nbytes(jax.ShapeDtypeStruct(shape, dtype))
        self.assertEqual(held, float("inf"))


if __name__ == "__main__":
    absltest.main()
