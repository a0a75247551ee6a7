import csv
import importlib
import shutil
import tempfile
from pathlib import Path

import pytest
from absl.testing import absltest, parameterized

from configs import ablation_drop
from tests import xla_flags
from tests.train import commands, tiny_grid
from train import ablation
from train.config import config as config_lib
from train.config import validation
from train.config.config import ConfigError
from train.reports import measurements
from train.runs import records

_GRID = "--config=tests/train/tiny_grid.py"
# What is trained does not matter here: compiled in less time, as in other tests.
_QUICK = {"XLA_FLAGS": xla_flags.devices(1)}


def _run(module, *arguments):
    return commands.run(module, *arguments, variables=_QUICK)


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
            lambda c: setattr(c, "variants", 3),
            "config.variants takes a ConfigDict",
        ),
        (lambda c: setattr(c, "base", "small"), "config.base takes a ConfigDict, got"),
        (lambda c: c.base.__delattr__("layers"), "config.base: .*layers"),
        (
            lambda c: c.variants.half.__delattr__("dropit"),
            "config.variants.half has the fields memory, dropit, seeds, and may have l",
        ),
        (
            lambda c: setattr(c.variants.half, "remat", "blocks"),
            r"and may have layers; got \[.*'remat'",
        ),
        (lambda c: setattr(c.variants.half, "layers", 3), "config.variants.half: "),
        (lambda c: setattr(c.variants.half, "seeds", ()), "takes different seeds"),
        (lambda c: setattr(c.variants.half, "seeds", (1, 1)), "takes different seeds"),
        (lambda c: setattr(c.variants.half, "seeds", (1.5,)), "config.variants.half: "),
        (lambda c: setattr(c.variants.half, "seeds", ([1],)), "config.variants.half: "),
        (lambda c: setattr(c.variants.half, "memory", 3), "config.variants.half: "),
    )
    def test_a_config_that_is_no_grid(self, change, message):
        config = tiny_grid.get_config()
        with config.ignore_type():
            change(config)
        with pytest.raises(ConfigError, match=message):
            ablation.runs(config)

    def test_the_grid_of_the_paper(self):
        """Checks the variants and seeds that docs/results.md has."""
        config = importlib.import_module("configs.ablation_cifar10").get_config()
        runs = ablation.runs(config)
        seeds: dict[str, int] = {}
        for run in runs:
            validation.validate(run.config)
            seeds[run.variant] = seeds.get(run.variant, 0) + 1
        for name in ("baseline", "min_k_80_d16", "min_k_80_d16384", "default"):
            self.assertEqual(seeds[name], 3)
        for name in ("dropit", "lean", "min_k_50_int4", "plain_int4"):
            self.assertEqual(seeds[name], 3)
        for name in ("channels_80", "random_80", "min_k_75_int4_mean", "plain_int2"):
            self.assertEqual(seeds[name], 1)
        for rate in (50, 80, 90, 99):
            for chunk_size in (16, 2**14):
                self.assertIn(f"min_k_{rate}_d{chunk_size}", seeds)
        trained = {
            (
                run.config.memory,
                run.config.layers,
                config_lib.policy(run.config)
                if config_lib.uses_policy(run.config)
                else None,
            )
            for run in runs
        }
        self.assertLen(trained, len(seeds))
        self.assertEqual(
            {run.config.layers for run in runs if run.variant in ("dropit", "lean")},
            {"flax"},
        )

    @parameterized.parameters("digits_vit", "digits_resnet18", "cifar10")
    def test_the_grids_of_drop(self, model):
        config = ablation_drop.get_config(model)
        runs = ablation.runs(config)
        found: dict[str, list[int]] = {}
        for run in runs:
            validation.validate(run.config)
            found.setdefault(run.config.memory, []).append(run.config.seed)
            self.assertEqual(run.variant, run.config.memory)
            self.assertEqual(run.config.layers, "flax")
        seeds = [42, 1, 2]
        names = ("baseline", "exact", "lean", "leanest")
        self.assertEqual(found, dict.fromkeys(names, seeds))
        if model != "cifar10":
            own = importlib.import_module(f"configs.{model}").get_config()
            self.assertEqual(config.base, own)

    def test_another_grid_of_drop(self):
        with pytest.raises(ValueError, match=r"no model 'vit'; known are 'digits_vit'"):
            ablation_drop.get_config("vit")

    def test_what_a_variant_does_not_say_of_layers_is_as_in_the_base(self):
        config = tiny_grid.get_config()
        config.base.layers = "dropit"
        config.variants.half.layers = "flax"
        layers = [run.config.layers for run in ablation.runs(config)]
        self.assertEqual(layers, ["dropit", "flax", "dropit"])

    def test_of_two_lengths_the_one_that_counts_is_left(self):
        config = tiny_grid.get_config()
        with config.ignore_type():
            config.base.num_epochs = 7
        for run in ablation.runs(config):
            self.assertEqual((run.config.num_epochs, run.config.num_steps), (None, 80))


class CommandTest(parameterized.TestCase):
    def test_it_trains_what_is_not_trained_yet(self):
        directory = Path(self.enterContext(tempfile.TemporaryDirectory()))
        where = f"--workdir={directory}"
        status, _, errors = _run("train.ablation", _GRID, where, "--variants=half")
        self.assertEqual((status, errors), (0, ""))
        self.assertEqual(self.results(directory), [("half", "3")])
        before = records.read(directory / "half/seed_3/metrics.csv")

        status, _, errors = _run("train.ablation", _GRID, where)
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
        self.assertEqual((row["memory"], row["layers"]), ("baseline", "flax"))
        self.assertEqual((row["strategy"], row["rate"]), ("", ""))
        self.assertEqual(row["status"], "finished")

        # The report of these runs.
        output = directory / "report"
        status, _, errors = _run("train.report", f"--output={output}", directory)
        self.assertEqual((status, errors), (0, ""))
        self.check_report(output, directory)

        # A run that is another one now is not taken for it, whatever is to be trained
        # and whether or not its checkpoints are there.
        shutil.rmtree(directory / "half/seed_3/checkpoints")
        table = (directory / "results.csv").read_text()
        changed = ("--config.variants.half.dropit.rate=0.6", "--variants=baseline")
        status, _, errors = _run("train.ablation", _GRID, where, *changed)
        self.assertEqual(status, 2)
        self.assertIn("half/seed_3 holds a run of another config", errors)
        self.assertIn("config.dropit.rate: 0.5 -> 0.6", errors)
        self.assertEqual((directory / "results.csv").read_text(), table)

        # Histograms need the last checkpoint.
        output = directory / "other"
        status, _, errors = _run("train.report", f"--output={output}", directory)
        self.assertEqual(status, 2)
        self.assertRegex(errors, "half/seed_3 has no checkpoint of step 80, its last")
        self.assertEqual(list(output.iterdir()), [])

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
        configs = {
            run.variant: run.config for run in ablation.runs(tiny_grid.get_config())
        }
        for row in (baseline, half):
            stored = measurements.stored_bytes(configs[row["variant"]])
            self.assertEqual(int(row["stored_bytes"]), stored)
        self.assertEqual((half["memory"], half["layers"]), ("dropit", "flax"))
        last = records.read(directory / "half/seed_3/metrics.csv")[-1]
        gain = last["test_accuracy"] - accuracies[0]  # of the same seed
        self.assertAlmostEqual(float(half["gain"]), gain)
        self.assertEqual((float(half["dropped"]), float(baseline["gain"])), (0.5, 0))
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

    def test_a_loss_that_is_not_finite_ends_its_run_alone(self):
        directory = Path(self.enterContext(tempfile.TemporaryDirectory()))
        status, _, errors = _run(
            "train.ablation",
            _GRID,
            f"--workdir={directory}",
            "--config.base.optimizer.learning_rate=1e38",
            "--config.base.schedule.warmup_epochs=0",
            "--config.variants.baseline.seeds=(3,)",
        )
        self.assertEqual(status, 2)
        self.assertIn("The loss of baseline/seed_3, half/seed_3 became inf", errors)
        with (directory / "results.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        self.assertEqual(
            [(row["variant"], row["status"], row["test_accuracy"]) for row in rows],
            [("baseline", "diverged", ""), ("half", "diverged", "")],
        )

    def test_a_variant_that_cannot_be_trained_is_named(self):
        directory = Path(self.enterContext(tempfile.TemporaryDirectory())) / "new"
        status, _, errors = _run(
            "train.ablation",
            _GRID,
            f"--workdir={directory}",
            "--config.variants.half.dropit.rate=1.5",
        )
        self.assertEqual(status, 2)
        self.assertRegex(errors, r"Variant 'half' .*rate must be in \[0, 1\)")
        self.assertFalse(directory.exists())

    def test_a_variant_that_there_is_not(self):
        directory = Path(self.enterContext(tempfile.TemporaryDirectory())) / "new"
        arguments = (_GRID, f"--workdir={directory}", "--variants=third")
        status, _, errors = _run("train.ablation", *arguments)
        self.assertEqual(status, 2)
        self.assertIn("--variants=third: the config has baseline, half.", errors)
        self.assertFalse(directory.exists())


if __name__ == "__main__":
    absltest.main()
