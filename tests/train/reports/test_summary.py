import csv
import io
import math

import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given
from hypothesis import strategies as st

from tests.train import tiny_grid
from train import ablation
from train.reports import summary
from train.reports.summary import Mean, Summary


def _summary(
    variant, memory="baseline", layers="dropit", accuracy=(0.5,), dropped=0.5, **policy
):
    fields = {
        "strategy": "min_k",
        "granularity": "element",
        "rate": 0.5,
        "chunk_size": 16,
        "value_dtype": None,
        "fill": "zero",
    }
    return Summary(
        variant=variant,
        memory=memory,
        layers=layers,
        policy=fields | policy if "dropit" in (memory, layers) else {},
        dropped=dropped,
        seeds=len(accuracy),
        test_accuracy=Mean.of(accuracy),
        gain=Mean.of([each - 0.55 for each in accuracy]),
        train_loss=Mean.of((1.25,)),
        stored_bytes=2**21 if variant == "baseline" else 2**20,
        temp_bytes=2**22,
        step_ratio=1.0,
    )


class MeanTest(parameterized.TestCase):
    @given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9))
    def test_the_error_is_that_of_numpy(self, values):
        result = Mean.of(values)
        np.testing.assert_allclose(result.mean, np.mean(values), atol=1e-9)
        expected = np.std(values, ddof=1) / np.sqrt(len(values))
        np.testing.assert_allclose(result.error, expected, atol=1e-9)

    def test_one_value_has_no_error(self):
        result = Mean.of([0.5])
        self.assertEqual(result.mean, 0.5)
        self.assertTrue(math.isnan(result.error))


class PageTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        channels = {"granularity": "channel", "chunk_size": None}
        self.summaries = [
            _summary("baseline", "baseline", "flax", (0.5, 0.7)),
            _summary("a", accuracy=(0.41,), rate=0.5),
            _summary("b", accuracy=(0.42,), dropped=13 / 16, rate=0.8),
            _summary("c", accuracy=(0.43,), dropped=0.8, rate=0.8, chunk_size=2**14),
            _summary("d", accuracy=(0.44,), dropped=7 / 8, rate=0.8, **channels),
            _summary("g", accuracy=(0.47,), rate=0.5, fill="mean"),
            _summary("h", accuracy=(0.48,), rate=0.5),
            _summary("e", accuracy=(0.45,), rate=0.5, value_dtype="int4"),
            _summary("f", accuracy=(0.46,), rate=0.0),
            _summary("i", "lean", "flax", accuracy=(0.49,)),
            _summary("j", "dropit", "flax", accuracy=(0.4,), rate=0.5),
        ]
        config = tiny_grid.get_config().base
        self.page = summary.to_markdown(self.summaries, config, "l4")

    def test_the_grid_is_by_what_is_dropped_and_by_rate(self):
        grid = self.page.partition("## Every variant")[0]
        rows = [
            [cell.strip() for cell in line.split("|")[1:-1]]
            for line in grid.splitlines()
            if line.startswith("|")
        ]
        self.assertEqual(
            rows,
            [
                ["rate (baseline: 60.0 ± 10.0)", "50.0%", "80.0%"],
                ["---", "---", "---"],
                # Two variants that differ by something else are both there.
                ["min_k, elements, D = 16", "41.0; 48.0", "42.0 (81.2%)"],
                ["min_k, elements, D = 16384", "-", "43.0"],
                ["min_k, channels", "-", "44.0 (87.5%)"],
                ["min_k, elements, D = 16, mean", "47.0", "-"],
            ],
        )

    def test_every_variant_has_a_row(self):
        table = self.page.partition("## Every variant")[2]
        for each in self.summaries:
            self.assertIn(f"| `{each.variant}` |", table)
        self.assertIn("temp MiB on l4", table)
        self.assertIn("| 1.00 | 0.50 | 4.00 | 1.00 | 1.00 |", table)
        self.assertIn("| `baseline` | - | 2 | 60.0 ± 10.0 | - | 1.250 |", table)
        self.assertIn("| `a` | 50.0% | 1 | 41.0 | -14.0 | 1.250 |", table)
        self.assertIn("| `i` | - | 1 | 49.0 | -6.0 | 1.250 | 1.00 | 0.50 |", table)

    def test_without_layers_that_drop_there_is_no_grid(self):
        config = tiny_grid.get_config().base
        baseline, *_, lean, dropit = self.summaries
        page = summary.to_markdown([baseline, lean, dropit], config, "l4")
        self.assertNotIn("Granularity", page)
        self.assertIn("## Every variant\n\n| variant |", page)

    def test_the_csv_has_what_the_page_has(self):
        rows = list(csv.DictReader(io.StringIO(summary.to_csv(self.summaries))))
        self.assertEqual([row["variant"] for row in rows], ["baseline", *"abcdghefij"])
        self.assertAlmostEqual(float(rows[0]["test_accuracy"]), 0.6)
        self.assertAlmostEqual(float(rows[0]["test_accuracy_error"]), 0.1)
        self.assertAlmostEqual(float(rows[1]["gain"]), -0.14)
        self.assertEqual((rows[1]["gain_error"], rows[1]["dropped"]), ("", "0.5"))
        self.assertEqual(
            [(row["memory"], row["layers"]) for row in (rows[0], rows[1], rows[-2])],
            [("baseline", "flax"), ("baseline", "dropit"), ("lean", "flax")],
        )
        self.assertEqual(
            (rows[0]["stored_bytes"], rows[-1]["stored_bytes"]), ("2097152", "1048576")
        )
        self.assertEqual((rows[0]["rate"], rows[4]["granularity"]), ("", "channel"))


class PolicyTest(parameterized.TestCase):
    def test_channels_have_no_chunks(self):
        run = ablation.runs(tiny_grid.get_config())[1].config
        run.dropit.granularity = "channel"
        policy = summary.policy(run)
        self.assertEqual(
            (policy["granularity"], policy["chunk_size"]), ("channel", None)
        )

    @parameterized.parameters(
        ("baseline", "flax", {}),
        ("lean", "flax", {}),
        ("dropit", "flax", {"rate": 0.5, "chunk_size": 16}),
        ("lean", "dropit", {"rate": 0.5, "chunk_size": 16}),
    )
    def test_it_is_of_the_preset_dropit_and_of_layers(self, memory, layers, expected):
        run = ablation.runs(tiny_grid.get_config())[1].config
        run.memory, run.layers = memory, layers
        policy = summary.policy(run)
        self.assertEqual({name: policy[name] for name in expected}, expected)
        self.assertEqual(bool(policy), bool(expected))


if __name__ == "__main__":
    absltest.main()
