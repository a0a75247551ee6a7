import csv
import importlib
import shutil
import tempfile
from pathlib import Path

import pytest
from absl.testing import absltest, parameterized

from tests.train import commands, tiny_grid
from train import ablation, records, validation
from train import config as config_lib
from train.config import ConfigError

_GRID = "--config=tests/train/tiny_grid.py"


class GridTest(parameterized.TestCase):
    def test_first_seeds_come_first(self):
        runs = ablation.runs(tiny_grid.get_config())
        self.assertEqual(
            [str(run.path) for run in runs],
            ["baseline/seed_3", "half/seed_3", "baseline/seed_4"],
        )
        self.assertEqual(
            [run.config.memory for run in runs],
            [
                "baseline",
                "dropit",
                "baseline",
            ],
        )
        self.assertEqual(runs[1].config.dropit.rate, 0.5)
        self.assertEqual(runs[2].config.seed, 4)

    def test_runs_differ_by_variant_and_seed_alone(self):
        config = tiny_grid.get_config()
        base = config_lib.to_json(config.base)
        for run in ablation.runs(config):
            changed = config_lib.differences(base, config_lib.to_json(run.config))
            for line in changed:
                self.assertRegex(line, r"^config\.(seed|memory|dropit\.\w+): ")

    @parameterized.parameters(
        (lambda c: c.__delattr__("base"), "config has the fields base, variants"),
        (lambda c: setattr(c, "more", 1), "config has the fields base, variants"),
        (lambda c: setattr(c, "variants", {}), "config.variants is empty"),
        (
            lambda c: c.variants.half.__delattr__("dropit"),
            "config.variants.half has the fields memory, dropit, seeds",
        ),
        (lambda c: setattr(c.variants.half, "seeds", ()), "takes different seeds"),
        (lambda c: setattr(c.variants.half, "seeds", (1, 1)), "takes different seeds"),
    )
    def test_a_config_that_is_no_grid(self, change, message):
        config = tiny_grid.get_config()
        with config.ignore_type():
            change(config)
        with pytest.raises(ConfigError, match=message):
            ablation.runs(config)

    def test_the_grid_of_the_paper(self):
        """What the documentation says was run."""
        config = importlib.import_module("configs.ablation_cifar10").get_config()
        runs = ablation.runs(config)
        seeds: dict[str, int] = {}
        for run in runs:
            validation.validate(run.config)
            seeds[run.variant] = seeds.get(run.variant, 0) + 1
        for name in ("baseline", "min_k_80_d16", "min_k_80_d16384", "default"):
            self.assertEqual(seeds[name], 3)
        for name in ("min_k_50_int4", "lean"):
            self.assertEqual(seeds[name], 3)
        for rate in (50, 80, 90, 99):
            for chunk_size in (16, 2**14):
                self.assertIn(f"min_k_{rate}_d{chunk_size}", seeds)
        presets = {run.variant: config_lib.memory(run.config) for run in runs}
        self.assertLen(set(map(repr, presets.values())), len(presets))


class CommandTest(parameterized.TestCase):
    def test_it_trains_what_is_not_trained_yet(self):
        directory = Path(self.enterContext(tempfile.TemporaryDirectory()))
        where = f"--workdir={directory}"
        status, _, errors = commands.run(
            "train.ablation", _GRID, where, "--variants=half"
        )
        self.assertEqual((status, errors), (0, ""))
        self.assertEqual(self.results(directory), [("half", "3")])
        before = records.read(directory / "half/seed_3/metrics.csv")

        status, _, errors = commands.run("train.ablation", _GRID, where)
        self.assertEqual((status, errors), (0, ""))
        self.assertEqual(
            self.results(directory),
            [("baseline", "3"), ("half", "3"), ("baseline", "4")],
        )
        self.assertEqual(records.read(directory / "half/seed_3/metrics.csv"), before)
        last = records.read(directory / "baseline/seed_4/metrics.csv")[-1]
        with (directory / "results.csv").open(newline="") as file:
            row = list(csv.DictReader(file))[-1]
        self.assertEqual(float(row["test_accuracy"]), last["test_accuracy"])
        self.assertEqual((row["strategy"], row["rate"]), ("", ""))

        # The report of these runs.
        output = directory / "report"
        status, _, errors = commands.run(
            "train.report", f"--output={output}", directory
        )
        self.assertEqual((status, errors), (0, ""))
        self.check_report(output, directory)

        # A run that is another one now is not taken for it.
        shutil.rmtree(output)
        changed = ("--config.base.optimizer.learning_rate=0.5",)
        status, _, errors = commands.run("train.ablation", _GRID, where, *changed)
        self.assertEqual(status, 2)
        self.assertIn("holds a run of another config", errors)

    def check_report(self, output, directory):
        with (output / "summary.csv").open(newline="") as file:
            baseline, half = csv.DictReader(file)
        accuracies = [
            records.read(directory / f"baseline/seed_{seed}/metrics.csv")[-1][
                "test_accuracy"
            ]
            for seed in (3, 4)
        ]
        mean = sum(accuracies) / 2
        # Of two values the standard error of the mean is half their distance.
        error = abs(accuracies[0] - accuracies[1]) / 2
        self.assertAlmostEqual(float(baseline["test_accuracy"]), mean, delta=1e-4)
        self.assertAlmostEqual(
            float(baseline["test_accuracy_error"]), error, delta=1e-4
        )
        self.assertEqual((baseline["seeds"], half["seeds"]), ("2", "1"))
        self.assertEqual(half["test_accuracy_error"], "")
        self.assertEqual(half["rate"], "0.5")
        # Half of the values, in bfloat16, and a bit for each place.
        ratio = int(half["cached_bytes"]) / int(baseline["cached_bytes"])
        self.assertAlmostEqual(ratio, (0.5 * 16 + 1) / 32, delta=0.02)
        for row in (baseline, half):
            self.assertGreater(int(row["temp_bytes"]), 0)
            self.assertGreater(float(row["step_ratio"]), 0)
        with (output / "curves.csv").open(newline="") as file:
            self.assertLen(list(csv.DictReader(file)), 3 * 2)
        page = (output / "report.md").read_text()
        self.assertIn(f"{100 * mean:.1f} ± {100 * error:.1f}", page)
        for name in ("accuracy", "loss", "tradeoff", "histograms"):
            self.assertIn(f"({name}.png)", page)
            self.assertGreater((output / f"{name}.png").stat().st_size, 1000)

    def results(self, directory):
        with (directory / "results.csv").open(newline="") as file:
            return [(row["variant"], row["seed"]) for row in csv.DictReader(file)]

    def test_a_variant_that_there_is_not(self):
        directory = Path(self.enterContext(tempfile.TemporaryDirectory())) / "new"
        arguments = (_GRID, f"--workdir={directory}", "--variants=third")
        status, _, errors = commands.run("train.ablation", *arguments)
        self.assertEqual(status, 2)
        self.assertIn("--variants=third: the config has baseline, half.", errors)
        self.assertFalse(directory.exists())


if __name__ == "__main__":
    absltest.main()
