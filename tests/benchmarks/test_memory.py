import dataclasses
import json
from unittest import mock

from absl.testing import absltest, parameterized

from benchmarks import memory as benchmark
from benchmarks import workloads
from dropit_jax import layer_preset, memory

# At most this share of the baseline's temporaries: (index of the workload, variant).
_BARS = {
    (0, "dropit"): 0.60,
    (0, "lean"): 0.30,
    (0, "lean+remat_blocks"): 0.30,
    (2, "dropit"): 0.73,
    (2, "lean"): 0.27,
    (2, "lean+remat_blocks"): 0.10,
}


class BarsTest(parameterized.TestCase):
    @parameterized.parameters(0, 2)
    def test_presets_save_what_they_are_for_on_an_h100(self, index):
        names = tuple(variant for row, variant in _BARS if row == index)
        workload = workloads.WORKLOADS[index]
        results = benchmark.measure(workload, "h100", ("baseline", *names))
        for result in results[1:]:
            bar = _BARS[index, result.variant]
            self.assertLessEqual(result.ratio, bar, result.variant)
        # Without remat nothing is recomputed but the scores of the attention.
        for result in results[1:]:
            if "remat" in result.variant:
                self.assertGreater(result.flops_ratio, 1.2)
            else:
                self.assertBetween(result.flops_ratio, 0.97, 1.03 * _core(results))

    def test_the_workloads_are_those_of_the_paper(self):
        described = [
            (w.model, w.image_size, w.batch, w.dtype) for w in workloads.WORKLOADS
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
        self.assertEqual(workloads.VARIANTS["baseline"], layer_preset("baseline"))
        self.assertEqual(workloads.VARIANTS["dropit"].conv.rate, 0.875)


def _core(results):
    """1, and what recomputing the attention's scores adds."""
    baseline = results[0]
    return baseline.flops_ratio / baseline.flops_ratio_with_attention


def _results(workload, max_batch=None):
    values = (workload.model, workload.image_size, workload.batch, workload.dtype)
    baseline = benchmark.Result(
        *values, "baseline", "l4", 2**30, 1.0, 1e12, 1.0, 0.96, max_batch
    )
    lean = dataclasses.replace(
        baseline, variant="lean", temp_bytes=2**28, ratio=0.25, flops=1.04e12
    )
    return [baseline, lean]


class PrintingTest(parameterized.TestCase):
    def test_markdown_has_a_row_for_each_variant_and_the_papers_figures(self):
        workload = workloads.WORKLOADS[2]
        text = benchmark.markdown(workload, _results(workload))
        self.assertIn("### ViT-B/16, 224², batch 128, float32, l4", text)
        self.assertIn("| lean | 256 | 0.250 | 1.000 | 0.960 |", text)
        self.assertIn("20,290 MB, with DropIT 16,052 MB, ratio 0.791", text)

    def test_markdown_has_the_largest_batches_where_asked_for(self):
        workload = workloads.WORKLOADS[3]
        text = benchmark.markdown(workload, _results(workload, {"a5000": 1024}))
        self.assertIn("| largest batch, a5000 |", text)
        self.assertIn("| 1,024 |", text)
        self.assertNotIn("The paper", text)

    def test_json_is_a_list_of_objects(self):
        results = [dataclasses.asdict(r) for r in _results(workloads.WORKLOADS[0])]
        wanted = [
            "model",
            "batch",
            "dtype",
            "variant",
            "target",
            "temp_bytes",
            "ratio",
            "flops_ratio",
        ]
        for result in json.loads(json.dumps(results)):
            self.assertContainsSubset(wanted, result)

    def test_the_largest_batch_is_searched_with_the_variants_own_step(self):
        workload = workloads.WORKLOADS[0]
        with mock.patch.object(memory, "max_batch") as search:
            benchmark.largest_batch(workload, "lean", "a5000")
        make_step, target = search.call_args.args
        self.assertEqual(target, "a5000")
        _, (_, _, images, labels), donate = make_step(24)
        self.assertEqual(images.shape, (24, 32, 32, 3))
        self.assertEqual(labels.shape, (24,))
        self.assertEqual(donate, (0, 1))


if __name__ == "__main__":
    absltest.main()
