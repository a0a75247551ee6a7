import contextlib
import dataclasses
import io
import json
from concurrent.futures import Executor, Future
from unittest import mock

import jax
import pytest
from absl.testing import absltest, parameterized

from benchmarks import allocated
from benchmarks.step_time import GPU_MODELS
from benchmarks.workloads import image_models
from benchmarks.workloads.variants import VARIANTS
from dropit_jax import memory
from tests.benchmarks import examples

_RESNET = "ResNet-18, 32², float32"


class _Here(Executor):
    """Runs in this process what is submitted, and counts it."""

    def __init__(self, *_, **__):
        self.submitted = []

    def submit(self, function, *args):
        self.submitted.append(args[:3])
        future = Future()
        future.set_result(function(*args))
        return future


def _gpu(kind="NVIDIA H100 80GB HBM3"):
    return mock.patch.object(
        jax, "devices", return_value=[mock.Mock(device_kind=kind, platform="gpu")]
    )


def _main(*flags):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            allocated.main(flags)
        except SystemExit as stop:
            return stop.code, err.getvalue()
    return out.getvalue()


class MeasuringTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        report = mock.Mock(peak_bytes=2**30)
        self.report = self.enterContext(
            mock.patch.object(memory, "compile_report", return_value=report)
        )
        self.enterContext(_gpu())

    @parameterized.parameters((None, 128), (8, 8))
    def test_what_ran_is_compared_with_what_was_predicted(self, batch, expected):
        processes = _Here()
        found = (2**30 + 2**20, 2**30 + 2**28)
        with mock.patch.object(allocated, "run", return_value=found):
            (lean,) = allocated.measure(_RESNET, ["lean"], "a100", batch, processes)
        # Compiled in one process, run in the next.
        self.assertEqual(processes.submitted, [(_RESNET, "lean", batch)] * 2)
        self.assertEqual((lean.batch, lean.target), (expected, "a100"))
        self.assertEqual(lean.compiled_bytes, 2**30 + 2**20)
        self.assertEqual(lean.ratio, 1.25)
        images = self.report.call_args.args[3]
        self.assertEqual(images.shape[0], expected)
        row = "| lean | 1,024 | 1,025 | 1,280 | 1.250 |"
        self.assertIn(row, allocated.markdown([lean]))

    def test_a_step_may_not_fit(self):
        with mock.patch.object(allocated, "run", return_value=None):
            (lean,) = allocated.measure(_RESNET, ["lean"], "h100", 8, _Here())
        self.assertIsNone(lean.ratio)
        row = "| lean | 1,024 | out of memory | out of memory | - |"
        self.assertIn(row, allocated.markdown([lean]))

    def test_json_has_every_variant_of_every_model(self):
        self.enterContext(mock.patch.object(jax, "default_backend", return_value="gpu"))
        self.enterContext(mock.patch.object(allocated, "ProcessPoolExecutor", _Here))
        self.enterContext(mock.patch.object(allocated, "run", return_value=(1, 2)))
        wide = examples.mlp(1)
        narrow = dataclasses.replace(wide, dtype="bfloat16")
        models = {each.name: (each, 9) for each in (wide, narrow)}
        self.enterContext(mock.patch.object(allocated, "GPU_MODELS", models))
        results = json.loads(_main("--json"))
        expected = [
            ("tiny", workload.dtype, name)
            for workload in (wide, narrow)
            for name in VARIANTS
            if name != "remat_dots"
            if name != "dropit_layers_float32" or workload is wide
        ]
        self.assertEqual(
            [(each["model"], each["dtype"], each["variant"]) for each in results],
            expected,
        )


class RunTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        tiny = examples.mlp(1)
        models = {"tiny": (tiny, 1)}
        self.enterContext(mock.patch.object(allocated, "GPU_MODELS", models))
        # Which this process would keep.
        self.update = self.enterContext(mock.patch.object(jax.config, "update"))

    def test_the_compiled_step_is_counted_and_the_allocator_asked(self):
        with _gpu() as devices:
            stats = devices.return_value[0].memory_stats
            stats.return_value = {"peak_bytes_in_use": 7, "bytes_in_use": 5}
            compiled, peak = allocated.run("tiny", "lean", 8, "/cache")
        self.assertEqual(peak, 7)
        self.update.assert_any_call("jax_compilation_cache_dir", "/cache")
        tiny, _ = allocated.GPU_MODELS["tiny"]
        step, args, donate = tiny.training_step(VARIANTS["lean"], 8)
        report = memory.compile_report(step, *args, donate=donate)
        self.assertEqual(compiled, report.peak_bytes)

    def test_only_a_lack_of_memory_is_a_result(self):
        for message in ("RESOURCE_EXHAUSTED: out of memory", "INTERNAL: no"):
            error = jax.errors.JaxRuntimeError(message)
            real = mock.patch.object(image_models, "real_arguments", side_effect=error)
            with self.subTest(message), real:
                if "RESOURCE" in message:
                    self.assertIsNone(allocated.run("tiny", "lean", 8, "/cache"))
                else:
                    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
                        allocated.run("tiny", "lean", 8, "/cache")


class CommandTest(parameterized.TestCase):
    @parameterized.parameters(
        ("--model=ResNet", "unknown model 'ResNet'; known are 'ResNet-18, 32², "),
        ("--variants=leen", "unknown variant 'leen'; known are 'baseline', "),
        ("--batch=0", "--batch: takes a positive integer, got 0"),
        ("--json", "an NVIDIA GPU is needed, and JAX finds "),
    )
    def test_what_cannot_be_is_one_line_and_exit_2(self, flag, message):
        code, printed = _main(flag)
        self.assertEqual(code, 2)
        self.assertStartsWith(printed, f"error: {message}")
        self.assertEqual(printed.count("\n"), 1)

    def test_models_are_those_that_are_timed(self):
        self.assertIs(allocated.GPU_MODELS, GPU_MODELS)


if __name__ == "__main__":
    absltest.main()
