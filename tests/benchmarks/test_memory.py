import contextlib
import dataclasses
import io
import json
import re
import types
from unittest import mock

import flax.linen as nn
import jax
import pytest
from absl.testing import absltest, parameterized

from benchmarks import memory as benchmark
from benchmarks import workloads
from benchmarks.variants import VARIANTS
from dropit_jax import layer_preset, memory
from dropit_jax.linen import tools
from train.models import encoder, resnet, vit

# At most this share of the baseline's temporaries: (index of the workload, variant).
_BARS = {
    (0, "drop exact"): 0.57,
    (0, "drop lean"): 0.32,
    (0, "dropit"): 0.60,
    (0, "lean"): 0.30,
    (2, "dropit"): 0.79,
    (2, "lean"): 0.35,
    (2, "lean+remat_blocks"): 0.25,
    (3, "drop exact"): 0.47,
    (3, "drop lean"): 0.33,
}
_BLOCKS = 3


def _shallow(workload):
    """A workload with a few of the blocks of a ViT, which are all alike."""
    if workload.attention is None:
        return workload
    _, *attention = workload.attention
    return dataclasses.replace(
        workload,
        make=lambda preset: workload.make(preset).clone(num_layers=_BLOCKS),
        attention=(_BLOCKS, *attention),
    )


class BarsTest(parameterized.TestCase):
    @parameterized.parameters(0, 2, 3)
    def test_presets_save_what_they_are_for_on_an_h100(self, index):
        names = tuple(variant for row, variant in _BARS if row == index)
        workload = _shallow(workloads.WORKLOADS[index])
        results = benchmark.measure(workload, "h100", ("baseline", *names))
        for result in results[1:]:
            bar = _BARS[index, result.variant]
            self.assertLessEqual(result.ratio, bar, result.variant)
        # Without remat nothing is recomputed but the scores of the attention.
        for result in results[1:]:
            if "remat" in result.variant:
                self.assertGreater(result.flops_ratio, 1.2)
            else:
                more = 1.01 if result.variant.startswith("drop ") else 1.03
                self.assertBetween(result.flops_ratio, 0.97, more * _core(results))
        self.assertEqual(results[0].traffic_ratio, 1)
        for result in results:
            of_baseline = result.traffic_bytes / results[0].traffic_bytes
            self.assertEqual(result.traffic_ratio, of_baseline)
            self.assertBetween(of_baseline, 0.9, 2)

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
        self.assertEqual(VARIANTS["dropit"].layers.conv.rate, 0.875)


class PlainTest(parameterized.TestCase):
    """What `drop` is measured on, and against, is made of Flax's own layers."""

    @parameterized.parameters((1, "baseline"), (1, "remat_blocks"), (3, "baseline"))
    def test_the_program_is_that_of_flaxs_layers(self, index, name):
        own = self._program(index, name)
        flax = types.SimpleNamespace(
            **{
                each.name: getattr(nn, each.name)
                for each in dataclasses.fields(tools.Toolbox)
            }
        )
        if name == "baseline":
            flax.remat = lambda block, **_: block
        for module in (encoder, resnet, vit):
            self.enterContext(mock.patch.object(module, "toolbox", return_value=flax))
        self.assertEqual(own, self._program(index, name))

    def _program(self, index, name):
        step, arguments, _ = workloads.WORKLOADS[index].training_step(VARIANTS[name])
        # Functions are printed with their addresses.
        return re.sub(r" at 0x\w+", "", str(jax.make_jaxpr(step)(*arguments)))

    def test_drop_is_measured_on_it(self):
        plain, blocks = (
            layer_preset("baseline"),
            layer_preset("baseline", remat="blocks"),
        )
        found = {name: each for name, each in VARIANTS.items() if each.drop}
        for name, each in found.items():
            self.assertEqual(each.layers, blocks if "remat" in name else plain)
        self.assertEqual(
            [each.drop for each in found.values()], ["exact", "lean", "leanest", "lean"]
        )
        self.assertEqual(VARIANTS["baseline"].layers, plain)
        self.assertEqual(VARIANTS["remat_blocks"].layers, blocks)


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
        workload = workloads.WORKLOADS[2]
        text = benchmark.markdown(workload, _results(workload))
        self.assertIn("### ViT-B/16, 224², batch 128, float32, l4", text)
        self.assertIn("| with attention | traffic GB | traffic ratio |\n", text)
        self.assertIn("| lean | 256 | 0.250 | 1.000 | 0.960 | 120.0 | 1.200 |\n", text)
        self.assertIn("20,290 MB, with DropIT 16,052 MB, ratio 0.791", text)

    def test_markdown_has_the_largest_batches_where_asked_for(self):
        workload = workloads.WORKLOADS[3]
        text = benchmark.markdown(workload, _results(workload, {"a5000": 1024}))
        self.assertIn("| traffic ratio | largest batch, a5000 |", text)
        self.assertIn("| 1.200 | 1,024 |", text)
        self.assertNotIn("The paper", text)

    def test_results_without_traffic_have_no_columns_of_it(self):
        workload = workloads.WORKLOADS[2]
        results = [
            dataclasses.replace(each, traffic_bytes=None, traffic_ratio=None)
            for each in _results(workload)
        ]
        text = benchmark.markdown(workload, results)
        self.assertNotIn("traffic", text)
        self.assertIn("| lean | 256 | 0.250 | 1.000 | 0.960 |\n", text)

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
            "traffic_bytes",
            "traffic_ratio",
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


def _main(*flags):
    """What the command prints, its errors, and of which variants it is asked."""
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
        of_functions = [
            "baseline",
            "drop exact",
            "drop lean",
            "drop leanest",
            "drop lean+remat_blocks",
        ]
        for target, names in asked.values():
            self.assertEqual(target, "h100")
            self.assertEqual(names[:5], of_functions)
            self.assertIn("remat_blocks", names)
        for workload in workloads.WORKLOADS:
            _, names = asked[workload.name]
            self.assertContainsSubset(["dropit", "lean"], names)
            # These differ from others in some of the models alone.
            self.assertEqual("remat_dots" in names, workload.model == "ViT-B/16")
            self.assertEqual("dropit_float32" in names, workload.dtype == "float32")

    def test_models_and_variants_can_be_chosen(self):
        name = "ViT-B/16, 224², bfloat16"
        printed, _, asked = _main(
            f"--model={name}", "--variants=lean,drop exact", "--target=l4", "--json"
        )
        self.assertEqual(asked, {name: ("l4", ["baseline", "drop exact", "lean"])})
        variants = [each["variant"] for each in json.loads(printed)]
        self.assertEqual(variants, ["baseline", "drop exact", "lean"])

    @parameterized.parameters(
        ("--model=ViT", "unknown model 'ViT'; known are 'ResNet-18, 32², float32', "),
        ("--variants=drop", "unknown variant 'drop'; known are 'baseline', 'drop ex"),
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
