import os
import signal
import threading
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

from dropit_jax import memory
from dropit_jax.memory.compiled import compiler_process, toolchain

_X = jax.ShapeDtypeStruct((64, 64), jnp.float32)


def _report(function=jnp.sin):
    return memory.compile_report(function, _X, target="h100")


def _started():
    """Counts the processes that are started."""
    plain = compiler_process._Process
    return mock.patch.object(compiler_process, "_Process", side_effect=plain)


class ProcessTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        toolchain.find()  # or this cannot be tested here

    def test_one_process_compiles_one_program_after_the_other(self):
        _report()
        with _started() as started:
            self.assertEqual(_report().flops, 0)
            self.assertEqual(_report(lambda x: x @ x).flops, 2 * 64**3)
        started.assert_not_called()

    def test_it_goes_on_after_an_error(self):
        _report()
        wrong = {"xla_no_such_option": True}
        with _started() as started:
            with pytest.raises(memory.CompilerError, match="xla_no_such_option"):
                memory.compile_report(
                    jnp.sin, _X, target="h100", compiler_options=wrong
                )
            _report()
        started.assert_not_called()

    def test_one_that_was_killed_while_idle_is_replaced(self):
        _report()
        (process,) = compiler_process._idle
        process._process.send_signal(signal.SIGKILL)
        process._process.wait()
        with _started() as started:
            _report()
        started.assert_called_once()
        self.assertNotIn(process, compiler_process._idle)

    def test_one_that_is_killed_at_work_is_told_and_replaced(self):
        program = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
        with (
            mock.patch.object(compiler_process, "_PROGRAM", program),
            mock.patch.object(compiler_process, "_idle", []),
            pytest.raises(
                memory.CompilerError, match=r"for h100 failed:\nIt ended with -9"
            ),
        ):
            _report()
        self.assertEqual(_report().flops, 0)

    def test_what_it_prints_before_it_ends_is_the_message(self):
        program = "import sys; print('no such compiler', file=sys.stderr); sys.exit(3)"
        with (
            mock.patch.object(compiler_process, "_PROGRAM", program),
            mock.patch.object(compiler_process, "_idle", []),
            pytest.raises(memory.CompilerError, match=r"failed:\nno such compiler$"),
        ):
            _report()

    def test_another_environment_takes_another_process(self):
        _report()
        with _started() as started, mock.patch.dict(os.environ, {"ANOTHER": "1"}):
            _report()
        started.assert_called_once()
        self.assertLen(compiler_process._idle, 1)

    def test_threads_compile_beside_each_other(self):
        reports = {}

        def compile_one(size):
            x = jax.ShapeDtypeStruct((size, size), jnp.float32)
            reports[size] = memory.compile_report(lambda x: x @ x, x, target="h100")

        sizes = (32, 64, 128)
        threads = [threading.Thread(target=compile_one, args=(n,)) for n in sizes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        flops = {size: report.flops for size, report in reports.items()}
        self.assertEqual(flops, {size: 2 * size**3 for size in sizes})

    def test_it_ends_with_its_requests(self):
        _report()
        (process,) = compiler_process._idle
        process._process.stdin.close()
        self.assertEqual(process._process.wait(), 0)
        compiler_process._idle.clear()
        process._process.stdout.close()
        process._log.close()


if __name__ == "__main__":
    absltest.main()
