import contextlib
import dataclasses
import functools
import io
import json
from unittest import mock

import pytest
from absl.testing import absltest, parameterized

from benchmarks import memory as benchmark
from benchmarks.workloads import image_models, transformer
from benchmarks.workloads.variants import VARIANTS
from dropit_jax import memory
from train.models.layers import FLAX

# At most this share of the baseline's temporaries: (index of the workload, variant).
_BARS = {
    (0, "exact"): 0.76,
    (0, "lean"): 0.47,
    (0, "dropit_layers"): 0.71,
    (3, "exact"): 0.52,
    (3, "lean"): 0.39,
    (3, "lean+remat_blocks"): 0.35,
}
_BLOCKS = 2


def _shallow(workload):
    """A workload with a few of the blocks of its model, which compiles in less time."""
    if workload.attention is None:
        make = functools.partial(workload.make, stage_sizes=(_BLOCKS,))
        return dataclasses.replace(workload, make=make)
    _, *attention = workload.attention
    return dataclasses.replace(
        workload,
        make=functools.partial(workload.make, num_layers=_BLOCKS),
        attention=(_BLOCKS, *attention),
    )


class BarsTest(parameterized.TestCase):
    @parameterized.parameters(0, 3)
    def test_presets_save_what_they_are_for_on_an_h100(self, index):
        names = tuple(variant for row, variant in _BARS if row == index)
        workload = _shallow(image_models.WORKLOADS[index])
        results = benchmark.measure(workload, "h100", ("baseline", *names))
        for result in results[1:]:
            bar = _BARS[index, result.variant]
            self.assertLessEqual(result.ratio, bar, result.variant)
        # Without remat nothing is recomputed but the scores of the attention.
        for result in results[1:]:
            if "remat" in result.variant:
                self.assertGreater(result.flops_ratio, 1.2)
            else:
                self.assertBetween(result.flops_ratio, 0.97, 1.01 * _core(results))
        self.assertEqual(results[0].traffic_ratio, 1)
        for result in results:
            of_baseline = result.traffic_bytes / results[0].traffic_bytes
            self.assertEqual(result.traffic_ratio, of_baseline)
            self.assertBetween(of_baseline, 0.9, 2)

    def test_the_workloads_are_those_of_the_paper(self):
        described = [
            (w.model, w.image_size, w.batch, w.dtype) for w in image_models.WORKLOADS
        ]
        self.assertEqual(
            described,
            [
                ("ResNet-18", 32, 128, "float32"),
                ("ResNet-18", 224, 256, "float32"),
                ("ViT-B/16", 224, 128, "float32"),
                ("ViT-B/16", 224, 128, "bfloat16"),
            ],
        )

    def test_presets_are_measured_on_plain_flax_and_policies_without_a_preset(self):
        for variant in VARIANTS.values():
            self.assertFalse(variant.preset and variant.policy)
            self.assertEqual(variant.layers == FLAX, variant.policy is None)
        policies = [each.policy for each in VARIANTS.values() if each.policy]
        self.assertEqual(
            [(each.rate, each.chunk_size, each.value_dtype) for each in policies],
            [(0.875, 16, None), (0.875, 16, "bfloat16")],
        )


def _core(results):
    """1, and what recomputing the attention's scores adds."""
    baseline = results[0]
    return baseline.flops_ratio / baseline.flops_ratio_with_attention


def _results(workload, max_batch=None):
    values = (workload.model, workload.image_size, workload.batch, workload.dtype)
    baseline = benchmark.Result(
        *values, "baseline", "l4", 2**30, 1.0, 1e12, 1.0, 0.96, max_batch, 10**11, 1.0
    )
    lean = dataclasses.replace(
        baseline, variant="lean", temp_bytes=2**28, ratio=0.25, flops=1.04e12
    )
    lean = dataclasses.replace(lean, traffic_bytes=12 * 10**10, traffic_ratio=1.2)
    return [baseline, lean]


class PrintingTest(parameterized.TestCase):
    def test_markdown_has_a_row_for_each_variant_and_the_papers_figures(self):
        workload = image_models.WORKLOADS[2]
        text = benchmark.markdown(workload, _results(workload))
        self.assertIn("### ViT-B/16, 224², batch 128, float32, l4", text)
        self.assertIn("| with attention | traffic GB | traffic ratio |\n", text)
        self.assertIn("| lean | 256 | 0.250 | 1.000 | 0.960 | 120.0 | 1.200 |\n", text)
        self.assertIn("20,290 MB, with DropIT 16,052 MB, ratio 0.791", text)

    def test_markdown_has_the_largest_batches_where_asked_for(self):
        workload = image_models.WORKLOADS[3]
        text = benchmark.markdown(workload, _results(workload, {"a5000": 1024}))
        self.assertIn("| traffic ratio | largest batch, a5000 |", text)
        self.assertIn("| 1.200 | 1,024 |", text)
        self.assertNotIn("The paper", text)

    def test_results_without_traffic_have_no_columns_of_it(self):
        workload = image_models.WORKLOADS[2]
        results = [
            dataclasses.replace(each, traffic_bytes=None, traffic_ratio=None)
            for each in _results(workload)
        ]
        text = benchmark.markdown(workload, results)
        self.assertNotIn("traffic", text)
        self.assertIn("| lean | 256 | 0.250 | 1.000 | 0.960 |\n", text)

    def test_json_is_a_list_of_objects(self):
        results = [dataclasses.asdict(r) for r in _results(image_models.WORKLOADS[0])]
        wanted = [
            "model",
            "batch",
            "dtype",
            "variant",
            "target",
            "temp_bytes",
            "ratio",
            "flops_ratio",
            "traffic_bytes",
            "traffic_ratio",
        ]
        for result in json.loads(json.dumps(results)):
            self.assertContainsSubset(wanted, result)

    def test_the_largest_batch_is_searched_with_the_variants_own_step(self):
        workload = image_models.WORKLOADS[0]
        with mock.patch.object(memory, "max_batch") as search:
            benchmark.largest_batch(workload, "lean", "a5000")
        make_step, target = search.call_args.args
        self.assertEqual(target, "a5000")
        _, (_, _, images, labels), donate = make_step(24)
        self.assertEqual(images.shape, (24, 32, 32, 3))
        self.assertEqual(labels.shape, (24,))
        self.assertEqual(donate, (0, 1))


def _main(*flags):
    """Returns the output of the command, its errors, and the variants it measures."""
    out, err, asked = io.StringIO(), io.StringIO(), {}

    def measure(workload, target, names):
        asked[workload.name] = target, names
        return [
            dataclasses.replace(each, target=target, variant=name)
            for each, name in zip(_results(workload) * 9, names, strict=False)
        ]

    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(benchmark, "measure", measure),
    ):
        benchmark.main(flags)
    return out.getvalue(), err.getvalue(), asked


class CommandTest(parameterized.TestCase):
    def test_all_models_have_all_of_their_variants(self):
        printed, _, asked = _main()
        self.assertEqual([*asked], [*benchmark.MODELS])
        self.assertEqual(printed.count("### "), 5)
        of_all = ["exact", "lean", "leanest", "lean+remat_blocks", "remat_blocks"]
        for target, names in asked.values():
            self.assertEqual((target, names[0]), ("h100", "baseline"))
            self.assertContainsSubset(of_all, names)
        _, names = asked[transformer.SCANNED.name]
        self.assertCountEqual(names, ["baseline", *of_all])
        for workload in image_models.WORKLOADS:
            _, names = asked[workload.name]
            self.assertContainsSubset(["dropit", "dropit_layers"], names)
            # These differ from others in some of the models alone.
            self.assertEqual("remat_dots" in names, workload.model == "ViT-B/16")
            wide = workload.dtype == "float32"
            self.assertEqual("dropit_layers_float32" in names, wide)

    def test_models_and_variants_can_be_chosen(self):
        name = "ViT-B/16, 224², bfloat16"
        printed, _, asked = _main(
            f"--model={name}", "--variants=lean,exact", "--target=l4", "--json"
        )
        self.assertEqual(asked, {name: ("l4", ["baseline", "exact", "lean"])})
        variants = [each["variant"] for each in json.loads(printed)]
        self.assertEqual(variants, ["baseline", "exact", "lean"])

    @parameterized.parameters(
        ("--model=ViT", "unknown model 'ViT'; known are 'ResNet-18, 32², float32', "),
        ("--variants=drop", "unknown variant 'drop'; known are 'baseline', 'exact'"),
        ("--target=h1000", "Unknown target 'h1000'"),
    )
    def test_what_cannot_be_is_one_line_and_exit_2(self, flag, message):
        err = io.StringIO()
        with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as raised:
            benchmark.main(["--model=ResNet-18, 32², float32", flag])
        self.assertEqual(raised.value.code, 2)
        self.assertStartsWith(err.getvalue(), f"error: {message}")


if __name__ == "__main__":
    absltest.main()
