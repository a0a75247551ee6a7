import functools
import os
import tempfile
from pathlib import Path
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

from dropit_jax import DropIT, compress, dot_general, memory
from dropit_jax import linen as dn

_X = jax.ShapeDtypeStruct((64, 128), jnp.float32)
_W = jax.ShapeDtypeStruct((128, 128), jnp.float32)
_NUMBERS = (((1,), (0,)), ((), ()))


def _step(w, x):
    return w - jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w)))(w)


class CompileReportTest(parameterized.TestCase):
    def test_the_local_backends_report_is_memory_analysis(self):
        report = memory.compile_report(_step, _W, _X, donate=0)
        compiled = jax.jit(_step, donate_argnums=0).lower(_W, _X).compile()
        analysis = compiled.memory_analysis()
        self.assertEqual(report.target, jax.default_backend())
        self.assertEqual(report.temp_bytes, analysis.temp_size_in_bytes)
        self.assertEqual(report.argument_bytes, 4 * (128 * 128 + 64 * 128))

    @parameterized.parameters("h100", "a5000")
    def test_a_gpus_report_without_the_gpu(self, target):
        kept = memory.compile_report(_step, _W, _X, target=target)
        donated = memory.compile_report(_step, _W, _X, target=target, donate=0)
        self.assertEqual(kept.target, target)
        for report in (kept, donated):
            self.assertEqual(report.argument_bytes, 4 * (128 * 128 + 64 * 128))
            self.assertEqual(report.output_bytes, 4 * 128 * 128)
        # The product, at least, and its cotangent may share a buffer; not much more.
        self.assertGreaterEqual(kept.temp_bytes, 4 * 64 * 128)
        self.assertEqual(kept.aliased_bytes, 0)
        self.assertEqual(donated.aliased_bytes, 4 * 128 * 128)

    def test_pytrees_and_keys_are_arguments_too(self):
        def step(state, key):
            noise = jax.random.normal(key, state["w"].shape)
            return {"w": state["w"] + noise}

        key = jax.eval_shape(lambda: jax.random.key(0))
        report = memory.compile_report(step, {"w": _W}, key, target="h100", donate=0)
        self.assertEqual(report.aliased_bytes, 4 * 128 * 128)

    def test_a_description_may_be_a_file(self):
        description = (memory._TARGETS / "l4.textproto").read_text()
        path = self._file("mine.textproto", description)
        report = memory.compile_report(_step, _W, _X, target=path)
        self.assertEqual(report.target, "mine")

    def test_unknown_targets_are_named_with_the_known_ones(self):
        with pytest.raises(
            memory.TargetError, match=r"'h1000'.*a100, a5000, a6000, h100, l4"
        ):
            memory.compile_report(_step, _W, _X, target="h1000")

    def test_a_missing_plugin_is_told_with_the_command_to_install_it(self):
        variables = {memory.COMPILER_PATH_VARIABLE: ""}
        with (
            mock.patch.dict(os.environ, variables),
            mock.patch("sys.path", []),
            pytest.raises(
                memory.CompilerError, match=r"pip install .jax-cuda12-plugin=="
            ),
        ):
            memory.compile_report(_step, _W, _X, target="h100")

    def test_a_compiler_that_fails_is_quoted(self):
        path = self._file("bad.textproto", "nonsense")
        with pytest.raises(memory.CompilerError, match=r"for bad failed:\n.*\n"):
            memory.compile_report(_step, _W, _X, target=path)

    def _file(self, name, content):
        path = Path(self.enterContext(tempfile.TemporaryDirectory())) / name
        path.write_text(content)
        return path


class CachedBytesTest(parameterized.TestCase):
    @parameterized.parameters(0.0, 0.5, 0.875)
    def test_is_the_residuals_size(self, rate):
        policy = DropIT(rate)

        def loss(w, x):
            return dot_general(x, w, _NUMBERS, dropit=policy).sum()

        expected = jax.eval_shape(lambda x: compress(x, policy), _X).nbytes
        self.assertEqual(memory.cached_bytes(jax.grad(loss), _W, _X), expected)
        self.assertEqual(memory.cached_bytes(jax.jit(jax.grad(loss)), _W, _X), expected)
        self.assertEqual(memory.cached_bytes(loss, _W, _X), 0)

    def test_every_step_of_a_loop_counts(self):
        policy = DropIT(0.5)

        def loss(ws, x):
            def layer(x, w):
                return dot_general(x, w, _NUMBERS, dropit=policy), None

            return jax.lax.scan(layer, x, ws)[0].sum()

        ws = jax.ShapeDtypeStruct((3, 128, 128), jnp.float32)
        once = jax.eval_shape(lambda x: compress(x, policy), _X).nbytes
        self.assertEqual(memory.cached_bytes(jax.grad(loss), ws, _X), 3 * once)


class Tower(nn.Module):
    """Convolutions, and between them a function that keeps its own input."""

    dropit: DropIT | None

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(dn.Conv, use_bias=False, dropit=self.dropit)
        for _ in range(6):
            x = jnp.sin(conv(64, (3, 3))(x))
        return x


class SavingTest(parameterized.TestCase):
    @parameterized.parameters(16, 2**14)
    def test_memory_falls_on_the_gpu(self, chunk_size):
        x = jax.ShapeDtypeStruct((32, 32, 32, 64), jnp.float32)

        def temp_bytes(policy):
            tower = Tower(policy)
            params = jax.eval_shape(tower.init, jax.random.key(0), x)
            gradient = jax.grad(lambda p, x: tower.apply(p, x).sum())
            return memory.compile_report(gradient, params, x, target="h100").temp_bytes

        # Of a layer's two tensors the sine's input stays, the convolution's goes.
        dropped = temp_bytes(DropIT(0.9, chunk_size=chunk_size))
        self.assertLess(dropped, 0.85 * temp_bytes(None))


if __name__ == "__main__":
    absltest.main()
