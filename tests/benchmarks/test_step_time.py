import contextlib
import dataclasses
import functools
import io
import json
from unittest import mock

import chex
import jax
import pytest
from absl.testing import absltest, parameterized

from benchmarks import step_time
from benchmarks.workloads import image_models
from benchmarks.workloads.variants import TIMED_VARIANTS
from dropit_jax import memory
from tests.benchmarks import examples

_TINY = examples.mlp(2, width=16)


def _main(*flags):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        step_time.main(flags)
    return out.getvalue(), err.getvalue()


def _tiny_models():
    models = {"tiny": (_TINY, 2)}
    return mock.patch.multiple(step_time, MODELS=models, CPU_MODELS=models)


class MeasuringTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        # `main` switches it off for the process.
        enabled = jax.config.jax_enable_compilation_cache
        name = "jax_enable_compilation_cache"
        self.addCleanup(functools.partial(jax.config.update, name, enabled))
        self.enterContext(_tiny_models())

    def test_json_is_a_list_of_objects_for_plain_flax_and_what_was_asked_for(self):
        printed, progress = _main(
            "--variants=lean", "--rounds=3", "--calls=2", "--json"
        )
        results = json.loads(printed)
        self.assertEqual([result["variant"] for result in results], ["flax", "lean"])
        fields = [field.name for field in dataclasses.fields(step_time.Result)]
        for result in results:
            self.assertCountEqual(result, fields)
            self.assertEqual((result["model"], result["rounds"]), ("tiny", 3))
            self.assertEqual((result["dtype"], result["calls"]), ("float32", 2))
            for figure in ("median_s", "ratio", "trace_s", "compile_s"):
                self.assertGreater(result[figure], 0)
            self.assertBetween(
                result["ratio"], result["ratio_low"], result["ratio_high"]
            )
        self.assertEqual((results[0]["ratio"], results[0]["compile_ratio"]), (1, 1))
        self.assertEqual(progress, "tiny: 2 variants, 3 rounds\n")

    def test_the_table_has_the_variants_and_says_what_a_ratio_is(self):
        flax = step_time.Result(
            "tiny", 8, 4, "flax", "cpu", "float32", 2, 1, 1.5, 1, 1, 1, 0.25, 1.75, 1, 0
        )
        lean = dataclasses.replace(flax, variant="lean", median_s=3, ratio=2)
        lean = dataclasses.replace(lean, ratio_high=2.5, temp_bytes=3 * 2**19)
        with mock.patch.object(step_time, "measure") as measure:
            measure.return_value = [flax, lean]
            printed, progress = _main("--model=tiny", "--variants=lean")
        measure.assert_called_once_with(_TINY, ["flax", "lean"], 2, 1, 1)
        self.assertIn("### tiny, 8², batch 4, float32, cpu (", printed)
        self.assertIn("| flax | 1,500.0 | 1.000 [1.000, 1.000] | 0.0 | 0.2 |", printed)
        self.assertIn("| lean | 3,000.0 | 2.000 [1.000, 2.500] | 1.5 | 0.2 |", printed)
        self.assertIn("divided by the baseline's in the same round", printed)
        self.assertEqual(progress, "tiny: 2 variants, 2 rounds\n")

    @parameterized.parameters(
        ("--model=MPL", "unknown model 'MPL'; known are 'tiny'"),
        ("--variants=flax,leen", "unknown variant 'leen'; known are 'flax', "),
        ("--variants=lean,", "unknown variant ''; known are 'flax', "),
    )
    def test_unknown_names_are_one_line_and_exit_2(self, flag, message):
        err = io.StringIO()
        with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as raised:
            step_time.main([flag])
        self.assertEqual(raised.value.code, 2)
        self.assertStartsWith(err.getvalue(), f"error: {message}")
        self.assertEqual(err.getvalue().count("\n"), 1)

    def test_steps_are_compiled_as_often_as_asked_for(self):
        steps = step_time.compile_steps(_TINY, ("flax",), 2)
        step = steps["flax"]
        self.assertLen(step.total_s, 2)
        self.assertEqual(step.total_s[1], step.trace_s[1] + step.compile_s[1])

    def test_temporaries_are_those_of_the_compiled_step(self):
        (result,) = step_time.measure(_TINY, ("flax",), rounds=1)
        step, arguments, _ = _TINY.training_step(TIMED_VARIANTS["flax"])
        compiled = jax.jit(step).lower(*arguments).compile()
        self.assertEqual(
            result.temp_bytes, compiled.memory_analysis().temp_size_in_bytes
        )


class WorkloadsTest(parameterized.TestCase):
    def test_models_and_variants(self):
        described = {
            name: (workload.model, workload.image_size, workload.batch)
            for name, (workload, _) in step_time.CPU_MODELS.items()
        }
        self.assertEqual(
            described,
            {
                "MLP": ("MLP", 28, 256),
                "ResNet-18 (width 16)": ("ResNet-18 (width 16)", 32, 32),
                "ResNet-18 (width 64)": ("ResNet-18 (width 64)", 32, 32),
                "ViT-S/16": ("ViT-S/16", 224, 4),
            },
        )
        found = {
            name: (each.preset, each.policy and each.policy.chunk_size, each.remat)
            for name, each in TIMED_VARIANTS.items()
        }
        self.assertEqual(
            found,
            {
                "flax": ("", None, "none"),
                "exact": ("exact", None, "none"),
                "lean": ("lean", None, "none"),
                "dropit_16": ("", 16, "none"),
                "dropit_32": ("", 32, "none"),
                "dropit_16384": ("", 2**14, "none"),
                "remat_blocks": ("", None, "blocks"),
                "remat_dots": ("", None, "dots"),
            },
        )

    def test_a_gpu_has_the_models_of_the_paper(self):
        workloads_here = [each for each, _ in step_time.GPU_MODELS.values()]
        self.assertEqual(workloads_here, [*image_models.WORKLOADS])
        names = [*step_time.GPU_MODELS]
        self.assertEqual(names[-1], "ViT-B/16, 224², bfloat16")
        for backend, expected in (("gpu", names), ("cpu", [*step_time.CPU_MODELS])):
            with (
                mock.patch.object(jax, "default_backend", return_value=backend),
                mock.patch.object(step_time, "measure", return_value=[]) as measure,
            ):
                _main("--json")
            asked = [call.args[0] for call in measure.call_args_list]
            self.assertEqual(asked, [step_time.MODELS[name][0] for name in expected])

    @parameterized.parameters(
        ("MLP", 784 * 1024 + 3 * 1024**2 + 4 * 1024 + 10 * 1025),
        # Touvron et al., 2021, Table 1: 22 million with 1000 classes.
        ("ViT-S/16", 21_669_514),
    )
    def test_models_have_the_parameters_of_their_names(self, name, count):
        workload, _ = step_time.MODELS[name]
        _, arguments, _ = workload.training_step(TIMED_VARIANTS["flax"])
        leaves = jax.tree.leaves(arguments[0]["params"])
        self.assertEqual(sum(leaf.size for leaf in leaves), count)

    def test_arguments_are_those_that_every_kind_of_variant_takes(self):
        arguments = image_models.real_arguments(_TINY)
        for name in ("lean", "dropit_16", "remat_blocks"):
            _, abstract, _ = _TINY.training_step(TIMED_VARIANTS[name])
            chex.assert_trees_all_equal_shapes_and_dtypes(arguments, abstract)
        labels = arguments[-1]
        self.assertBetween(int(labels.min()), 0, 9)
        self.assertBetween(int(labels.max()), 0, 9)

    def test_what_loses_nothing_changes_no_gradient_of_the_mlp(self):
        arguments = image_models.real_arguments(_TINY)
        updated = {}
        for name in ("flax", "exact", "remat_blocks", "remat_dots"):
            step, _, _ = _TINY.training_step(TIMED_VARIANTS[name])
            updated[name] = jax.jit(step)(*arguments)
        for each in updated.values():
            chex.assert_trees_all_close(each, updated["flax"], rtol=1e-6, atol=1e-6)

    def test_a_block_of_the_mlp_is_a_hidden_layer(self):
        def residuals(name):
            variant = TIMED_VARIANTS[name]
            _, (variables, _, images, _), _ = _TINY.training_step(variant)
            saved = memory.saved_residuals(
                variant.model(_TINY.make).apply, variables, images, True
            )
            return [each.shape for each in saved.residuals if each.adds_memory]

        # What enters the second hidden layer and the head; plain Flax keeps the flags
        # of the ReLUs beside it.
        self.assertEqual(residuals("remat_blocks").count((4, 16)), 2)
        self.assertEqual(residuals("flax").count((4, 16)), 4)


if __name__ == "__main__":
    absltest.main()
