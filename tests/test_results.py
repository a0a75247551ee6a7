"""The tables of the README and of docs/ say what the files in docs/results/ say."""

import csv
import io
import itertools
import json
import math
import statistics
from pathlib import Path

import rich.console
from absl.testing import absltest

from benchmarks import memory
from train import compare
from train.reports import summary
from train.reports.summary import Mean, Summary
from train.system import tables

_ROOT = Path(__file__).parent.parent
_RESULTS = _ROOT / "docs" / "results"
_TARGET = "h100"

# The columns of the README's table of memory: variants of `benchmarks.memory`.
_OVERVIEW = {
    "plain": "baseline",
    '`"exact"`': "exact",
    '`"lean"`': "lean",
    '`"leanest"`': "leanest",
    "`jax.checkpoint`": "remat_blocks",
}
# The models that `configs/ablation_drop.py` trains.
_TRAINED = {
    "digits_vit": "ViT-µ, digits, 60 epochs",
    "digits_resnet18": "ResNet-18, digits, 10 epochs",
    "cifar10": "ResNet-18 of width 8, CIFAR-10, 300 steps of 128 images",
}
_PRESETS = {
    "plain Flax": "baseline",
    "exact": "exact",
    "lean": "lean",
    "leanest": "leanest",
}


def _compared():
    """Returns the lines of the table that `make train` prints."""
    results = {
        name: compare.Measurements(**fields)
        for name, fields in json.loads((_RESULTS / "digits.json").read_text()).items()
    }
    text = io.StringIO()
    rich.console.Console(file=text, width=100).print(compare.table(results, _TARGET))
    return tuple(text.getvalue().splitlines())


def _allocated():
    """Yields what `benchmarks.memory` printed: a workload and its results."""
    rows = json.loads((_RESULTS / "memory.json").read_text())
    results = [memory.Result(**row) for row in rows]
    for workload in memory.MODELS.values():
        own = (workload.model, workload.image_size, workload.batch, workload.dtype)
        of_workload = [
            result
            for result in results
            if (result.model, result.image_size, result.batch, result.dtype) == own
        ]
        yield workload, of_workload


def _title(workload):
    """Returns the title of a workload's table in docs/, without asterisks."""
    return workload.title(_TARGET).removeprefix("### ")


def _memory_tables():
    """Yields the title and the lines of each table that `benchmarks.memory` prints."""
    for workload, results in _allocated():
        _, _, *lines = memory.markdown(workload, results).splitlines()
        table = itertools.takewhile(_is_of_table, lines)
        yield f"**{_title(workload)}**", tuple(table)


def _overview():
    """Returns the README's table of memory: temporaries, and ratios to the plain."""
    rows = []
    for workload, results in _allocated():
        if workload.image_size is None:  # the README has the models with images alone
            continue
        by_variant = {result.variant: result for result in results}
        cells = [
            f"{result.temp_bytes * 2**-20:,.0f}"
            + ("" if name == "baseline" else f" ({result.ratio:.2f})")
            for name in _OVERVIEW.values()
            for result in [by_variant[name]]
        ]
        rows.append([_title(workload).removesuffix(f", {_TARGET}"), *cells])
    return tuple(tables.to_markdown(["model", *_OVERVIEW], rows))


def _accuracies(name):
    """Returns, by preset, the test accuracy in per cent by seed."""
    found: dict[str, dict[str, float]] = {}
    with (_RESULTS / "drop" / f"{name}.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            accuracy = 100 * float(row["test_accuracy"])
            found.setdefault(row["memory"], {})[row["seed"]] = accuracy
    return found


def _accuracy_tables():
    """Yields the title and the lines of each table of training with `drop`."""
    for name, title in _TRAINED.items():
        found = _accuracies(name)
        seeds = list(found["baseline"])
        rows = [
            [
                label,
                *(f"{found[preset][seed]:.1f}" for seed in seeds),
                f"{statistics.mean(found[preset].values()):.1f}",
            ]
            for label, preset in _PRESETS.items()
        ]
        header = ["preset", *(f"seed {seed}" for seed in seeds), "mean"]
        yield f"**{title}**", tuple(tables.to_markdown(header, rows))


def _mean_accuracies():
    """Returns the README's table of accuracy: the means over the seeds."""
    rows = []
    for name, title in _TRAINED.items():
        found = _accuracies(name)
        means = [statistics.mean(found[each].values()) for each in _PRESETS.values()]
        rows.append([title, *(f"{mean:.1f}" for mean in means)])
    names = [name for name in _OVERVIEW if _OVERVIEW[name] in _PRESETS.values()]
    return tuple(tables.to_markdown(["model", *names], rows))


def _summarised():
    """Returns the lines of the table of every variant of `train.report`."""
    with (_RESULTS / "ablation" / "summary.csv").open(newline="") as file:
        summaries = [_summary(row) for row in csv.DictReader(file)]
    _, _, *lines = summary.variants_table(summaries, _TARGET)
    return lines


def _summary(row):
    def mean(name):
        error = row[f"{name}_error"]
        return Mean(float(row[name]), float(error) if error else math.nan)

    policy = {name: row[name] for name in summary.POLICY}
    return Summary(
        variant=row["variant"],
        memory=row["memory"],
        layers=row["layers"],
        policy=policy if any(policy.values()) else {},
        dropped=float(row["dropped"]),
        seeds=int(row["seeds"]),
        test_accuracy=mean("test_accuracy"),
        gain=mean("gain"),
        train_loss=mean("train_loss"),
        stored_bytes=int(row["stored_bytes"]),
        temp_bytes=int(row["temp_bytes"]),
        step_ratio=float(row["step_ratio"]),
    )


def _is_of_table(line):
    return line.startswith(tuple("|│┃┏┡└"))


def _tables(page):
    """Yields the tables of a page, each with the last line before it with text."""
    title = ""
    for is_table, group in itertools.groupby(
        page.read_text().split("\n"), _is_of_table
    ):
        own = list(group)
        if is_table:
            yield title, tuple(own)
        else:
            title = ([title] + [line for line in own if line])[-1]


def _has_figures(table):
    return any(character.isdigit() for line in table for character in line)


class ReadmeTest(absltest.TestCase):
    def test_its_figures_are_those_of_the_results(self):
        found = [table for _, table in _tables(_ROOT / "README.md")]
        self.assertEqual(
            [table for table in found if _has_figures(table)],
            [_overview(), _compared(), _mean_accuracies()],
        )


class DropPageTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.tables = dict(_tables(_ROOT / "docs" / "drop.md"))

    def test_it_has_every_table_of_memory(self):
        for title, table in _memory_tables():
            with self.subTest(title):
                self.assertEqual(self.tables.get(title), table)

    def test_it_has_the_accuracy_of_every_run(self):
        for title, table in _accuracy_tables():
            with self.subTest(title):
                self.assertEqual(self.tables.get(title), table)


class ResultsPageTest(absltest.TestCase):
    def test_its_tables_are_those_of_the_reports(self):
        printed = {
            line
            for page in _RESULTS.glob("*/*.md")
            for line in page.read_text().splitlines()
        }
        page = (_ROOT / "docs" / "results.md").read_text()
        lines = [line for line in page.splitlines() if _is_of_table(line)]
        self.assertNotEmpty(lines)
        for line in lines:
            self.assertIn(line, printed)

    def test_the_report_has_every_row_of_the_summary(self):
        report = (_RESULTS / "ablation" / "report.md").read_text().splitlines()
        rows = [line for line in report if line.startswith("| `")]
        self.assertEqual(rows, _summarised())


if __name__ == "__main__":
    absltest.main()
