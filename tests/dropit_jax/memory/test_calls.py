"""Reports of functions that are jitted already, and under switches of JAX."""

import contextlib
import functools
import math

import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

from dropit_jax import memory

_X = jax.ShapeDtypeStruct((64, 128), jnp.float32)
_W = jax.ShapeDtypeStruct((128, 128), jnp.float32)
_BYTES = 4 * math.prod(_W.shape)


def _step(w, x):
    return w - jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w)))(w)


def _repeated(count, w, x):
    return functools.reduce(lambda w, _: _step(w, x), range(count), w)


def _printing(w, x):
    jax.debug.print("{}", x[0, 0])
    return _step(w, x)


def _calling(w, x):
    x = jax.pure_callback(lambda x: x, _X, x)
    return _step(w, x)


class JittedTest(parameterized.TestCase):
    @parameterized.parameters(
        (None, {"donate_argnums": 0}),
        (None, {"donate_argnames": "w"}),
        ("h100", {"donate_argnames": "w"}),
    )
    def test_its_donation_is_heeded(self, target, options):
        report = memory.compile_report(jax.jit(_step, **options), _W, _X, target=target)
        self.assertEqual(report.aliased_bytes, _BYTES)

    def test_the_reports_donation_is_heeded(self):
        report = memory.compile_report(jax.jit(_step), _W, _X, donate=0)
        self.assertEqual(report.aliased_bytes, _BYTES)

    def test_both_is_an_error(self):
        step = jax.jit(_step, donate_argnums=0)
        with pytest.raises(ValueError, match="donate=1: the function is jitted"):
            memory.compile_report(step, _W, _X, donate=1)

    @parameterized.parameters(("h100", 3), (None, 1), (None, 3))
    def test_arguments_may_be_static(self, target, count):
        step = jax.jit(_repeated, static_argnums=0, donate_argnums=1)
        report = memory.compile_report(step, count, _W, _X, target=target)
        plain = memory.compile_report(
            functools.partial(_repeated, count), _W, _X, target=target, donate=0
        )
        self.assertEqual(report.flops, plain.flops)
        self.assertEqual(report.temp_bytes, plain.temp_bytes)
        self.assertEqual(report.aliased_bytes, _BYTES)

    def test_static_arguments_that_cannot_be_told_are_an_error(self):
        step = jax.jit(lambda n, scale, x: x * n * scale, static_argnums=0)
        with pytest.raises(ValueError, match=r"1 are static, and 2 have no arrays"):
            memory.compile_report(step, 2, 3.0, _X)

    @parameterized.parameters(_printing, _calling)
    def test_calls_of_the_host_are_for_the_device_at_hand(self, step):
        report = memory.compile_report(step, _W, _X)
        self.assertEqual(report.output_bytes, _BYTES)
        with pytest.raises(ValueError, match=r"on the host \(.*test_calls.py:"):
            memory.compile_report(step, _W, _X, target="h100")


class SwitchesTest(parameterized.TestCase):
    @parameterized.named_parameters(
        (
            "types",
            lambda: jax.enable_x64(True),
            lambda: jax.numpy_dtype_promotion("strict"),
            lambda: jax.numpy_rank_promotion("raise"),
        ),
        ("eager", jax.disable_jit, lambda: jax.default_prng_impl("rbg")),
        (
            "numbers",
            lambda: jax.debug_nans(True),
            lambda: jax.default_matmul_precision("highest"),
        ),
    )
    def test_they_reach_the_compiler(self, *switches):
        def step(w, x):
            noise = jax.random.normal(jax.random.key(0), (8,))
            return _step(w, x), jnp.arange(10), noise

        with contextlib.ExitStack() as stack:
            for switch in switches:
                stack.enter_context(switch())
            report = memory.compile_report(step, _W, _X, target="h100")
            results = jax.eval_shape(step, _W, _X)
        sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(results)]
        self.assertBetween(report.output_bytes - sum(sizes), 0, 64)  # and pointers
        self.assertEqual(report.flops, 2 * 2 * 64 * 128 * 128)


if __name__ == "__main__":
    absltest.main()
