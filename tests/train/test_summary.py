import csv
import io
import math

import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given
from hypothesis import strategies as st

from tests.train import tiny_grid
from train import ablation, summary
from train.summary import Mean, Summary


def _summary(variant, memory="dropit", accuracy=(0.5,), **policy):
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
        policy={} if memory == "baseline" else fields | policy,
        seeds=len(accuracy),
        test_accuracy=Mean.of(accuracy),
        train_loss=Mean.of((1.25,)),
        cached_bytes=2**21 if memory == "baseline" else 2**20,
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
        self.summaries = [
            _summary("baseline", "baseline", (0.5, 0.7)),
            _summary("a", accuracy=(0.41,), rate=0.5),
            _summary("b", accuracy=(0.42,), rate=0.8),
            _summary("c", accuracy=(0.43,), rate=0.8, chunk_size=2**14),
            _summary("d", accuracy=(0.44,), rate=0.8, granularity="channel"),
            _summary("e", accuracy=(0.45,), rate=0.5, value_dtype="int4"),
            _summary("f", memory="lean", accuracy=(0.46,), rate=0.0),
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
                ["dropped (baseline: 60.0 ± 10.0)", "50.0%", "80.0%"],
                ["---", "---", "---"],
                ["min_k, elements, D = 16", "41.0", "42.0"],
                ["min_k, elements, D = 16384", "-", "43.0"],
                ["min_k, channels", "-", "44.0"],
            ],
        )

    def test_every_variant_has_a_row(self):
        table = self.page.partition("## Every variant")[2]
        for each in self.summaries:
            self.assertIn(f"| `{each.variant}` |", table)
        self.assertIn("temp MiB on l4", table)
        self.assertIn("| 1.00 | 0.50 | 4.00 | 1.00 | 1.00 |", table)

    def test_the_csv_has_what_the_page_has(self):
        rows = list(csv.DictReader(io.StringIO(summary.to_csv(self.summaries))))
        self.assertEqual([row["variant"] for row in rows], ["baseline", *"abcdef"])
        self.assertEqual(rows[0]["test_accuracy"], "0.6000")
        self.assertEqual(rows[0]["test_accuracy_error"], "0.1000")
        self.assertEqual((rows[0]["rate"], rows[4]["granularity"]), ("", "channel"))


class PolicyTest(parameterized.TestCase):
    def test_dropped_is_what_a_chunk_loses(self):
        run = ablation.runs(tiny_grid.get_config())[1].config
        for rate, chunk_size, dropped in (
            (0.5, 16, 0.5),
            (0.99, 16, 15 / 16),
            (0.9, 2**14, 1 - 1638 / 2**14),
        ):
            run.dropit.rate, run.dropit.chunk_size = rate, chunk_size
            self.assertEqual(summary.policy(run)["dropped"], dropped)

    def test_channels_have_no_chunks(self):
        run = ablation.runs(tiny_grid.get_config())[1].config
        run.dropit.granularity = "channel"
        policy = summary.policy(run)
        self.assertEqual(
            (policy["granularity"], policy["chunk_size"]), ("channel", None)
        )
        self.assertNotIn("dropped", policy)

    def test_the_baseline_has_none(self):
        self.assertEqual(
            summary.policy(ablation.runs(tiny_grid.get_config())[0].config), {}
        )


if __name__ == "__main__":
    absltest.main()
