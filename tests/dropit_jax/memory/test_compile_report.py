import contextlib
import functools
import os
import tempfile
from pathlib import Path
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from dropit_jax import DropIT, compress, dot_general, memory
from dropit_jax import linen as dn
from dropit_jax.memory.compiled import devices
from dropit_jax.memory.traced import scopes

_X = jax.ShapeDtypeStruct((64, 128), jnp.float32)
_W = jax.ShapeDtypeStruct((128, 128), jnp.float32)
_NUMBERS = (((1,), (0,)), ((), ()))


def _step(w, x):
    return w - jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w)))(w)


def _other_step(x, w):
    return _step(w, x)


class CompileReportTest(parameterized.TestCase):
    def test_the_local_backends_report_is_memory_analysis(self):
        report = memory.compile_report(_step, _W, _X, donate=0)
        compiled = jax.jit(_step, donate_argnums=0).lower(_W, _X).compile()
        analysis = compiled.memory_analysis()
        self.assertEqual(report.target, jax.default_backend())
        self.assertEqual(report.temp_bytes, analysis.temp_size_in_bytes)
        self.assertEqual(report.argument_bytes, 4 * (128 * 128 + 64 * 128))

    @parameterized.parameters(("h100", 0), ("a5000", ()))
    def test_a_gpus_report_without_the_gpu(self, target, donate):
        report = memory.compile_report(_step, _W, _X, target=target, donate=donate)
        self.assertEqual(report.target, target)
        self.assertEqual(report.argument_bytes, 4 * (128 * 128 + 64 * 128))
        self.assertEqual(report.output_bytes, 4 * 128 * 128)
        # The product, at least, and its cotangent may share a buffer; not much more.
        self.assertGreaterEqual(report.temp_bytes, 4 * 64 * 128)
        donated = donate == 0
        self.assertEqual(report.aliased_bytes, donated * 4 * 128 * 128)

    def test_donated_arguments_count_from_either_end(self):
        last, same = (
            memory.compile_report(_other_step, _X, _W, donate=index)
            for index in (np.int64(-1), (1,))
        )
        self.assertEqual(last.aliased_bytes, 4 * 128 * 128)
        self.assertEqual(same.aliased_bytes, 4 * 128 * 128)
        with pytest.raises(ValueError, match=r"donate=2: there are 2 arguments"):
            memory.compile_report(_other_step, _X, _W, donate=2)

    def test_double_precision(self):
        with jax.enable_x64(True):
            x = jax.ShapeDtypeStruct((64,), jnp.float64)
            report = memory.compile_report(lambda x: 2 * x, x, target="h100")
        self.assertEqual(report.argument_bytes, 64 * 8)

    def test_arguments_on_several_devices_are_told(self):
        mesh = jax.sharding.Mesh(jax.devices()[:2], ("x",))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
        x = jax.ShapeDtypeStruct((64,), jnp.float32, sharding=sharding)
        with pytest.raises(ValueError, match="sharded over 2 devices, and a target is"):
            memory.compile_report(lambda x: 2 * x, x, target="h100")

    def test_pytrees_and_keys_are_arguments_too(self):
        def step(state, key):
            noise = jax.random.normal(key, state["w"].shape)
            return {"w": state["w"] + noise}

        key = jax.eval_shape(lambda: jax.random.key(0))
        report = memory.compile_report(step, {"w": _W}, key, target="h100", donate=0)
        self.assertEqual(report.aliased_bytes, 4 * 128 * 128)

    def test_a_description_may_be_a_file(self):
        description = (devices._DESCRIPTIONS / "l4.textproto").read_text()
        path = self._file("mine.textproto", description)
        report = memory.compile_report(_step, _W, _X, target=path)
        self.assertEqual(report.target, "mine")
        self.enterContext(contextlib.chdir(Path(path).parent))
        relative = memory.compile_report(_step, _W, _X, target="mine.textproto")
        self.assertEqual(relative, report)

    def test_unknown_targets_are_named_with_the_known_ones(self):
        with pytest.raises(
            memory.TargetError, match=r"'h1000'.*a100, a5000, a6000, h100, l4"
        ):
            memory.compile_report(_step, _W, _X, target="h1000")

    def test_a_missing_compiler_is_told_with_the_command_to_install_it(self):
        nowhere = {memory.COMPILER_PATH_VARIABLE: "nowhere"}
        command = r"pip install .*/nowhere jax-cuda12-plugin=="
        with (
            mock.patch.dict(os.environ, nowhere),
            pytest.raises(memory.CompilerMissingError, match=command),
        ):
            memory.compile_report(_step, _W, _X, target="h100")

    def test_a_compiler_that_fails_is_quoted(self):
        path = self._file("bad.textproto", "nonsense")
        with pytest.raises(memory.CompilerError, match=r"for bad failed:\n.*\n"):
            memory.compile_report(_step, _W, _X, target=path)

    def test_options_reach_the_compiler(self):
        def convolution(x, kernel):
            dims = ("NHWC", "HWIO", "NHWC")
            return jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=dims
            )

        x = jax.ShapeDtypeStruct((8, 32, 32, 64), jnp.float32)
        kernel = jax.ShapeDtypeStruct((3, 3, 64, 64), jnp.float32)
        size = 4 * 8 * 32 * 32 * 64
        compiled = functools.partial(
            memory.compile_report, convolution, x, kernel, target="a100"
        )
        # By itself XLA brings the channels before the height, and back.
        self.assertGreater(compiled().temp_bytes, size)
        options = {"xla_gpu_force_conv_nhwc": True}
        self.assertLess(compiled(compiler_options=options).temp_bytes, size)
        with pytest.raises(memory.CompilerError, match="xla_no_such_option"):
            compiled(compiler_options={"xla_no_such_option": True})
        with pytest.raises(ValueError, match="xla_dump_to is set by the report"):
            compiled(compiler_options={"xla_dump_to": "notes"})

    def _file(self, name, content):
        path = Path(self.enterContext(tempfile.TemporaryDirectory())) / name
        path.write_text(content)
        return path


class Layers(nn.Module):
    """A strided convolution between others."""

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Conv(64, (3, 3), use_bias=False, name="first")(x))
        x = jnp.tanh(nn.Conv(48, (3, 3), strides=2, use_bias=False, name="second")(x))
        x = x.reshape(len(x), -1)
        return nn.Dense(32, name="head")(x)


_IMAGES = jax.ShapeDtypeStruct((32, 16, 16, 32), jnp.float32)
# Of each layer: two operations for each weight, sample and position.
_LAYERS_FLOPS = {
    "first": 2 * (3 * 3 * 32 * 64) * 32 * (16 * 16),
    "second": 2 * (3 * 3 * 64 * 48) * 32 * (8 * 8),
    "head": 2 * (8 * 8 * 48 * 32) * 32,
}


@functools.cache
def _layers_report(target):
    def loss(params, x):
        return jnp.sum(Layers().apply(params, x) ** 2)

    params = jax.eval_shape(Layers().init, jax.random.key(0), _IMAGES)
    step = jax.grad(loss)
    return memory.compile_report(
        step, params, _IMAGES, target=target, num_buffers=10**6
    )


def _chain(layer, ws, x):
    for w in ws:
        x = layer(w, x)
    return jnp.sum(x)


def _layer(w, x):
    return jnp.tanh(x @ w)


class FlopsTest(parameterized.TestCase):
    @parameterized.parameters("h100", None)
    def test_the_products_of_layers_count(self, target):
        # The result, and the gradients of kernel and input, but of the first's input.
        expected = 3 * sum(_LAYERS_FLOPS.values()) - _LAYERS_FLOPS["first"]
        self.assertEqual(_layers_report(target).flops, expected)

    @parameterized.parameters(("h100", 1), (None, 0), (None, 1))
    def test_recomputed_products_count_again(self, target, again):
        layers = 3
        loss = functools.partial(_chain, _layer)
        loss = jax.checkpoint(loss) if again else loss
        ws = layers * [_W]
        report = memory.compile_report(jax.value_and_grad(loss), ws, _X, target=target)
        products = (3 + again) * layers - 1
        self.assertEqual(report.flops, products * 2 * 64 * 128 * 128)

    @parameterized.parameters("h100", None)
    def test_every_step_of_a_loop_and_one_branch_count(self, target):
        def fn(ws, x):
            x, _ = jax.lax.scan(lambda x, w: (_layer(w, x), None), x, ws)
            branches = [lambda x: x @ ws[0], lambda x: x @ ws[0] @ ws[1]]
            return jax.lax.cond(x[0, 0] > 0, *branches, x)

        ws = jax.ShapeDtypeStruct((5, 128, 128), jnp.float32)
        report = memory.compile_report(fn, ws, _X, target=target)
        self.assertEqual(report.flops, (5 + 2) * 2 * 64 * 128 * 128)


class TrafficTest(parameterized.TestCase):
    """In bytes of an array of 64 x 128 float32."""

    def _traffic(self, function, *args):
        report = memory.compile_report(function, *args, target="h100")
        return report.traffic_bytes / (4 * 64 * 128)

    def test_a_kernel_reads_its_operands_and_writes_its_result(self):
        self.assertEqual(self._traffic(lambda x, y: jnp.sin(x) + y, _X, _X), 3)

    def test_a_product_and_what_follows_it(self):
        # The kernel is as large as two of them.
        found = self._traffic(lambda w, x: jnp.sin(x @ w), _W, _X)
        self.assertBetween(found, 6, 6.01)

    def test_every_step_of_a_loop_counts_and_of_stacked_arrays_the_slice(self):
        steps = 5

        def function(ws, x):
            return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), x), x, ws)

        ws = jax.ShapeDtypeStruct((steps, 128, 128), jnp.float32)
        found = self._traffic(function, ws, _X)
        # Slices and what is carried may be copied; whole stacks would count for more
        # than 20 arrays a step.
        self.assertBetween(found, 7 * steps, 15 * steps + 5)


class Tower(nn.Module):
    """Three convolutions, and between them a function that keeps its own input."""

    dropit: DropIT | None

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(dn.Conv, use_bias=False, dropit=self.dropit)
        for _ in range(3):
            x = jnp.sin(conv(64, (3, 3))(x))
        return x


@functools.cache
def _tower_report(policy):
    x = jax.ShapeDtypeStruct((32, 32, 32, 64), jnp.float32)
    tower = Tower(policy)
    params = jax.eval_shape(tower.init, jax.random.key(0), x)
    gradient = jax.grad(lambda p, x: tower.apply(p, x).sum())
    return memory.compile_report(gradient, params, x, target="h100")


class BuffersTest(parameterized.TestCase):
    @parameterized.parameters(("h100", 0.9), (None, 1.0))
    def test_add_up_to_the_temporary_memory(self, target, least):
        report = _layers_report(target)
        sizes = [buffer.nbytes for buffer in report.buffers]
        self.assertEqual(sizes, sorted(sizes, reverse=True))
        self.assertLessEqual(sum(sizes), report.temp_bytes)
        self.assertGreaterEqual(sum(sizes), least * report.temp_bytes)

    def test_name_what_makes_them(self):
        # A sine's input is kept for its gradient: the output of each convolution.
        kept = {
            buffer.layer
            for buffer in _tower_report(None).buffers
            if (buffer.shape, buffer.dtype) == ((32, 32, 32, 64), "float32")
            and (buffer.operation, buffer.backward) == ("conv_general_dilated", False)
        }
        self.assertEqual(kept, {f"Conv_{i}" for i in range(3)})

    def test_tell_forward_from_backward(self):
        # While the gradient of the hidden layer is computed, its values are kept.
        def loss(w, v, x):
            return jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ v))

        shapes = ((128, 4096), (4096, 128), (1024, 128))
        args = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
        report = memory.compile_report(jax.grad(loss), *args, target="h100")
        hidden = [each for each in report.buffers if each.shape == (1024, 4096)]
        self.assertEqual(
            {(each.operation, each.backward) for each in hidden},
            {("dot_general", True), ("tanh", False)},
        )

    def test_name_workspaces_and_copies_of_arguments(self):
        operations = {each.operation for each in _layers_report("h100").buffers}
        copied = "args[0]['params']['second']['kernel']"
        self.assertContainsSubset({"dot_general workspace", copied}, operations)

    @parameterized.parameters("h100", None)
    def test_loops_work_in_place(self, target):
        def loss(ws, x):
            x, _ = jax.lax.scan(lambda x, w: (_layer(w, x), None), x, ws)
            return jnp.sum(x)

        ws = jax.ShapeDtypeStruct((64, 128, 128), jnp.float32)
        report = memory.compile_report(
            jax.grad(loss), ws, _X, target=target, num_buffers=10**6
        )
        total = sum(buffer.nbytes for buffer in report.buffers)
        self.assertBetween(total, 0.9 * report.temp_bytes, report.temp_bytes)

    def test_only_the_largest(self):
        # Two programs: of one, the second report would be without buffers if JAX's
        # compilation cache had it from the first.
        both = [
            memory.compile_report(
                jax.grad(functools.partial(_layer_sum, factor)), _W, _X, num_buffers=n
            )
            for factor, n in ((2.0, 1), (3.0, 10**6))
        ]
        self.assertEqual(both[0].buffers, both[1].buffers[:1])


def _layer_sum(factor, w, x):
    return jnp.sum(factor * _layer(w, x))


class ScopesTest(parameterized.TestCase):
    @parameterized.parameters(
        ("jit(step)/jvp(ResNet)/stage1/conv1/conv_general_dilated", "stage1/conv1"),
        ("jit(step)/transpose(jvp(ResNet))/stage1/norm/mul", "stage1/norm"),
        ("jit(call)/call_exported/jit(f)/jvp(Net)/jit(relu)/max", "Net"),
        ("jit(step)/jvp(Net)/dense/dense/jvp()/dot_general", "dense"),
        ("jit(f)/jvp(Net)/while/body/closed_call/block/conv/add", "block/conv"),
        ("jit(f)/jvp(Net)/while/body/eval_jaxpr/closed_call/block/add", "block"),
        ("jvp(Net)/head/transpose(transpose(jvp(Net)))/head/jvp()/gt", "head"),
        ("jvp(Net)/Net.encode/cond/branch_1_fun/attention/exp", "attention"),
        ("jvp(Net)/rematted_computation/attention/ab,bc->ac/dot_general", "attention"),
        ("jit(step)/reduce_sum", ""),
        ("jit(step)/jvp()/reduce_sum", ""),
        ("", ""),
    )
    def test_the_layers_of_operations(self, op_name, layer):
        self.assertEqual(
            scopes.layer_and_operation(op_name), (layer, op_name.rpartition("/")[2])
        )

    @parameterized.parameters(
        ("jvp(Net)/head/add", False),
        ("transpose(jvp(Net))/head/add", True),
        ("checkpoint/rematted_computation/head/add", True),
        ("jvp(Net)/head/transpose", False),
    )
    def test_the_pass_of_operations(self, op_name, backward):
        self.assertEqual(scopes.is_backward(op_name), backward)


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


class SavingTest(parameterized.TestCase):
    @parameterized.parameters(16, 2**14)
    def test_memory_falls_on_the_gpu(self, chunk_size):
        # Of a layer's two tensors the sine's input stays, the convolution's goes.
        dropped = _tower_report(DropIT(0.9, chunk_size=chunk_size)).temp_bytes
        self.assertLess(dropped, 0.85 * _tower_report(None).temp_bytes)


if __name__ == "__main__":
    absltest.main()
