import contextlib
import functools
import io
import json
from unittest import mock

import jax
import pytest
from absl.testing import absltest, parameterized

from benchmarks import drop_time, step_time
from benchmarks.workloads import transformer
from tests.benchmarks import examples

_STEPS = examples.mlp(1, width=16)
_BLOCKS = transformer.Transformer(
    layers=1, width=8, heads=2, tokens=4, batch=2, dtype="float32", scan=False
)


class CommandTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        # `main` switches it off for the process.
        enabled = jax.config.jax_enable_compilation_cache
        name = "jax_enable_compilation_cache"
        self.addCleanup(functools.partial(jax.config.update, name, enabled))
        changed = {"MODELS": {"tiny": (_STEPS, 2)}, "UNROLLED": _BLOCKS}
        self.enterContext(mock.patch.multiple(drop_time, **changed))

    def _main(self, *flags):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            drop_time.main(flags)
        return out.getvalue()

    def test_json_has_steps_and_plans(self):
        names = "flax", "lean"
        with mock.patch.multiple(drop_time, _COMPILE_ROUNDS=1, _NAMES=names):
            results = json.loads(self._main("--rounds=1", "--json"))
        steps, plans = results[:2], results[2:]
        self.assertEqual([each["variant"] for each in steps], [*names])
        for each in steps:
            self.assertEqual((each["model"], each["rounds"]), ("tiny", 1))
            self.assertGreater(each["ratio"], 0)
            self.assertGreater(each["compile_ratio"], 0)
        presets = [each["preset"] for each in plans]
        self.assertEqual(presets, ["exact", "lean", "leanest"])
        for each in plans:
            self.assertEqual(each["model"], _BLOCKS.model)
            self.assertGreater(each["plan_s"], 0)
            self.assertEqual(each["trace_s"], plans[0]["trace_s"])

    def test_tables_say_what_was_measured(self):
        planned = drop_time.Planning(_BLOCKS.model, "lean", 0.5, 1.25)
        step = step_time.Result(
            "tiny", 8, 4, "flax", "cpu", "float32", 2, 1, 1.5, 1, 1, 1, 0.25, 1.75, 1, 0
        )
        with (
            mock.patch.object(step_time, "measure", return_value=[step]) as measure,
            mock.patch.object(
                drop_time, "planning", return_value=[planned]
            ) as planning,
        ):
            printed = self._main()
        names = ("flax", "exact", "lean", "remat_blocks")
        measure.assert_called_once_with(_STEPS, names, 2, 3)
        planning.assert_called_once_with(_BLOCKS, 3)
        self.assertIn("| flax | 1,500.0 | 1.000 [1.000, 1.000] |", printed)
        self.assertIn("### Transformer of 1 blocks one by one, width 8, 2 he", printed)
        self.assertIn("| preset | gradient traced s | planned s |", printed)
        self.assertIn("| lean | 0.50 | 1.25 |", printed)
        self.assertIn("The baseline is flax.", printed)

    def test_an_unknown_model_is_one_line_and_exit_2(self):
        err = io.StringIO()
        with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as raised:
            drop_time.main(["--model=ViT"])
        self.assertEqual(raised.value.code, 2)
        known = f"'tiny', '{_BLOCKS.name}'"
        self.assertEqual(
            err.getvalue(), f"error: unknown model 'ViT'; known are {known}\n"
        )


class ModelsTest(parameterized.TestCase):
    def test_models_are_those_of_the_documentation(self):
        described = [(w.model, w.batch) for w, _ in drop_time.MODELS.values()]
        self.assertEqual(described, [("ViT-S/16", 8), ("ResNet-18 (width 64)", 32)])
        self.assertEqual(drop_time.UNROLLED.layers, 24)
        self.assertFalse(drop_time.UNROLLED.scan)


if __name__ == "__main__":
    absltest.main()
