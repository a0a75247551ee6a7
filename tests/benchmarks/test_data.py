from pathlib import Path
from unittest import mock

from absl.testing import absltest, parameterized

from benchmarks import data as benchmark

_DATA = Path(__file__).parents[1] / "data" / "tensorflow_datasets"


class DataTest(parameterized.TestCase):
    def test_every_variant_is_measured_in_every_round(self):
        few = [("none", 8, 0), ("shift_flip", 8, 1)]
        with mock.patch.object(benchmark, "_VARIANTS", few):
            rates = benchmark.measure(str(_DATA), batches=1, rounds=2)
        self.assertLen(rates, 2)
        for row in rates:
            self.assertLen(row, 2)
            self.assertGreater(min(row), 0)

    def test_the_table_has_medians_and_ratios_of_the_same_turn(self):
        rates = [[100.0, 1000.0, 100.0], *[[50.0, 1000.0, 25.0]] * 5]
        lines = benchmark.table(rates).splitlines()
        self.assertLen(lines, 8)
        self.assertEqual(lines[2], "| none | 32² | 0 | 100 | 1.000 |")
        self.assertEqual(lines[4], "| shift_flip | 32² | 1 | 50 | 0.500 |")


if __name__ == "__main__":
    absltest.main()
