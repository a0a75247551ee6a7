"""What a report refuses before anything is computed, and whom it holds against whom."""

from pathlib import Path

import pytest
from absl.testing import absltest, parameterized

from tests.train import tiny_grid
from train import report
from train.config.config import ConfigError
from train.runs.saved_runs import SavedRun


def _variants(**seeds):
    """Runs of each variant, of these seeds."""
    config = tiny_grid.get_config().base
    found = {}
    for name, own in seeds.items():
        found[name] = []
        for seed in own:
            one = config.copy_and_resolve_references()
            one.seed = seed
            found[name].append(SavedRun(Path(name) / f"seed_{seed}", one, []))
    return found


class ReportTest(parameterized.TestCase):
    def test_the_baseline_comes_first(self):
        found = report._with_first(_variants(a=[1], base=[1, 2]), "base")
        self.assertEqual(list(found), ["base", "a"])

    def test_there_has_to_be_a_baseline(self):
        with pytest.raises(ConfigError, match="--baseline=base: there are a, b"):
            report._with_first(_variants(a=[1], b=[1]), "base")

    def test_there_has_to_be_something_beside_it(self):
        with pytest.raises(ConfigError, match="no finished run of anything but base"):
            report._with_first(_variants(base=[1]), "base")

    def test_a_variant_has_a_seed_of_the_baseline(self):
        with pytest.raises(ConfigError, match=r"of a has the seed .* base: 2, 3"):
            report._with_first(_variants(base=[2, 3], a=[1]), "base")

    def test_histograms_are_of_the_first_seed_that_all_have(self):
        variants = _variants(base=[1, 2, 42], a=[42, 2], b=[42])
        self.assertEqual(report._common_seed(list(variants.values())), 42)
        self.assertEqual(report._common_seed([variants["base"], variants["a"]]), 2)
        other = _variants(c=[7])["c"]
        with pytest.raises(ConfigError, match="base: 1, 2, 42; c: 7"):
            report._common_seed([variants["base"], other])

    @parameterized.parameters(
        (None, ["base", "a"]),
        ([], ["base", "a"]),
        (["b"], ["base", "b"]),
        (["b", "base"], ["base", "b"]),
    )
    def test_which_histograms_are_drawn(self, chosen, expected):
        self.assertEqual(report._drawn(["base", "a", "b"], chosen), expected)

    def test_a_histogram_of_what_there_is_not(self):
        with pytest.raises(ConfigError, match="--histograms=c: there are base, a"):
            report._drawn(["base", "a"], ["c"])


if __name__ == "__main__":
    absltest.main()
