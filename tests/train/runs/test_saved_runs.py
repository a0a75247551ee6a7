import tempfile
from pathlib import Path

import pytest
from absl.testing import absltest, parameterized

from tests.train import tiny_grid
from train import ablation
from train.config import config as config_lib
from train.config.config import ConfigError
from train.runs import records, saved_runs


class FindTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.root = Path(self.enterContext(tempfile.TemporaryDirectory()))

    def write(self, path, config, steps=None):
        """A run as it lies on disk, done up to some step."""
        directory = self.root / path
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(config_lib.to_json(config))
        row = dict.fromkeys(records.COLUMNS, 0.5) | {"epoch": 1}
        row["step"] = config.num_steps if steps is None else steps
        lines = (",".join(records.COLUMNS), ",".join(str(row[n]) for n in row))
        (directory / "metrics.csv").write_text("\n".join(lines) + "\n")

    def find(self, *names):
        self.said = []
        where = [self.root / name for name in names or (".",)]
        return saved_runs.find(where, self.said.append)

    def write_grid(self):
        for run in ablation.runs(tiny_grid.get_config()):
            self.write(run.path, run.config)

    def test_seeds_of_a_variant_come_together(self):
        self.write_grid()
        found = self.find()
        seeds = {
            name: [run.config.seed for run in each] for name, each in found.items()
        }
        self.assertEqual(seeds, {"baseline": [3, 4], "half": [3]})

    def test_seeds_are_in_the_order_of_numbers(self):
        config = tiny_grid.get_config()
        config.variants.baseline.seeds = (42, 5, 100)
        for run in ablation.runs(config):
            if run.variant == "baseline":
                self.write(run.path, run.config)
        found = self.find()["baseline"]
        self.assertEqual([run.config.seed for run in found], [5, 42, 100])

    def test_single_runs_are_named_after_their_directories(self):
        first, second, _ = ablation.runs(tiny_grid.get_config())
        self.write("one", first.config)
        self.write("two", second.config)
        found = self.find("two", "one")
        self.assertEqual(list(found), ["two", "one"])

    def test_a_directory_named_twice_counts_once(self):
        self.write_grid()
        found = self.find(".", "half")
        self.assertEqual([len(each) for each in found.values()], [2, 1])

    def test_a_run_that_is_not_finished_is_left_out(self):
        first, second, _ = ablation.runs(tiny_grid.get_config())
        self.write(first.path, first.config)
        self.write(second.path, second.config, steps=40)
        self.assertEqual(list(self.find()), ["baseline"])
        (said,) = self.said
        self.assertRegex(said, r"^Left out: .*half/seed_3, which has 40.* of its 80 st")
        (self.root / second.path / "failure").mkdir()
        self.assertEqual(list(self.find()), ["baseline"])
        self.assertRegex(self.said[0], "half/seed_3, which ended with a loss that is n")
        with pytest.raises(ConfigError, match="half holds no finished run"):
            self.find("half")

    def test_what_saves_memory_may_differ(self):
        first, second, _ = ablation.runs(tiny_grid.get_config())
        second.config.remat, second.config.layers = "blocks", "dropit"
        self.write(first.path, first.config)
        self.write(second.path, second.config)
        self.assertEqual(sorted(self.find()), ["baseline", "half"])

    def test_runs_of_other_lengths_cannot_be_compared(self):
        first, second, _ = ablation.runs(tiny_grid.get_config())
        second.config.num_steps = 60
        self.write(first.path, first.config)
        self.write(second.path, second.config)
        with pytest.raises(
            ConfigError, match=r"cannot be compared:\n  config.num_steps"
        ):
            self.find()

    def test_one_variant_has_one_policy(self):
        first, second, _ = ablation.runs(tiny_grid.get_config())
        second.config.seed = 9
        self.write("a/same", first.config)
        self.write("b/same", second.config)
        with pytest.raises(ConfigError, match="both called 'same', and are not alike"):
            self.find()

    def test_one_seed_counts_once(self):
        first, *_ = ablation.runs(tiny_grid.get_config())
        self.write("a/same", first.config)
        self.write("b/same", first.config)
        with pytest.raises(ConfigError, match="'same', two have the same seed"):
            self.find()


if __name__ == "__main__":
    absltest.main()
