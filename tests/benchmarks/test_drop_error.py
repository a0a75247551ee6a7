import contextlib
import io
import json
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from benchmarks import drop_error
from benchmarks.workloads.variants import VARIANTS
from dropit_jax import plan
from tests.benchmarks import examples

_TINY = examples.mlp(2, width=64, batch=8)


def _main(*flags):
    out = io.StringIO()
    models = mock.patch.object(drop_error, "MODELS", {"tiny": _TINY})
    with contextlib.redirect_stdout(out), models:
        drop_error.main(flags)
    return out.getvalue()


class MeasuringTest(parameterized.TestCase):
    def test_errors_and_bytes_are_in_the_order_of_the_presets(self):
        results = json.loads(_main("--json"))
        self.assertEqual(
            [each["preset"] for each in results], ["exact", "lean", "leanest"]
        )
        exact, lean, leanest = (each["error"] for each in results)
        self.assertLess(exact, 1e-5)
        self.assertBetween(lean, 1e-4, 0.02)
        self.assertBetween(leanest, 5 * lean, 0.3)
        stored = [each["stored_bytes"] for each in results]
        self.assertEqual(stored, sorted(stored, reverse=True))
        # Both bytes are those of the plan.
        loss = _TINY.loss(VARIANTS["baseline"])
        _, (variables, _, images, labels), _ = _TINY.training_step(VARIANTS["baseline"])
        for each in results:
            planned = plan(loss, each["preset"])(
                variables["params"], {}, images, labels
            )
            self.assertEqual(each["stored_bytes"], planned.nbytes)
            self.assertEqual(each["plain_bytes"], planned.plain_bytes)

    def test_no_parameter_is_at_its_first_value(self):
        params, others, images, labels = drop_error._arguments(_TINY)
        for leaf in jax.tree.leaves(params):  # of which biases begin as zeros
            self.assertGreater(np.std(leaf), 0.01)
        self.assertEqual(others, {})
        self.assertEqual((images.shape[0], labels.shape), (8, (8,)))

    def test_the_error_is_that_of_all_arrays_together(self):
        rng = np.random.default_rng(0)
        found, expected = (
            {"a": rng.normal(size=(3, 4)), "b": (rng.normal(size=5),)} for _ in range(2)
        )
        flat = [
            np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
            for tree in (found, expected)
        ]
        norm = np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1])
        self.assertAlmostEqual(drop_error.relative_error(found, expected), norm)
        self.assertEqual(drop_error.relative_error(expected, expected), 0)

    def test_models_are_those_of_the_documentation(self):
        described = [(w.model, w.batch, w.dtype) for w in drop_error.MODELS.values()]
        expected = [
            ("ViT-S/16", 4, "float32"),
            ("ResNet-18 (width 16)", 16, "float32"),
        ]
        self.assertEqual(described, expected)


class PrintingTest(parameterized.TestCase):
    def test_the_table_has_a_row_for_each_preset(self):
        lean = drop_error.Result("tiny", 8, 4, "float32", "lean", 0.00514, 2**20, 2**22)
        with mock.patch.object(drop_error, "measure", return_value=[lean]):
            printed = _main("--model=tiny")
        self.assertIn("### tiny, 8², batch 4, float32, cpu (", printed)
        self.assertIn("| preset | error | stored MiB | plain MiB | ratio |", printed)
        self.assertIn("| lean | 0.0051 | 1.0 | 4.0 | 0.250 |", printed)

    def test_an_unknown_model_is_one_line_and_exit_2(self):
        err = io.StringIO()
        with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as raised:
            drop_error.main(["--model=ViT"])
        self.assertEqual(raised.value.code, 2)
        message = "error: unknown model 'ViT'; known are 'ViT-S/16', "
        self.assertStartsWith(err.getvalue(), message)


if __name__ == "__main__":
    absltest.main()
