"""The tables of the README say what the files under docs/results/ say."""

import csv
import io
import itertools
import json
import math
from pathlib import Path

import rich.console
from absl.testing import absltest

from benchmarks import memory, workloads
from train import compare
from train.reports import summary
from train.reports.summary import Mean, Summary

_ROOT = Path(__file__).parent.parent
_RESULTS = _ROOT / "docs" / "results"
_TARGET = "h100"


def _compared():
    """What `make train` prints: its title, of which there is none, and its lines."""
    results = {
        name: compare.Measurements(**fields)
        for name, fields in json.loads((_RESULTS / "digits.json").read_text()).items()
    }
    text = io.StringIO()
    rich.console.Console(file=text, width=100).print(compare.table(results, _TARGET))
    return ("", tuple(text.getvalue().splitlines()))


def _allocated():
    """What `benchmarks.memory` prints: the title and the lines of each table."""
    rows = json.loads((_RESULTS / "memory.json").read_text())
    results = [memory.Result(**row) for row in rows]
    for workload in workloads.WORKLOADS:
        own = (workload.model, workload.image_size, workload.batch, workload.dtype)
        of_workload = [
            result
            for result in results
            if (result.model, result.image_size, result.batch, result.dtype) == own
        ]
        title, _, *lines = memory.markdown(workload, of_workload).splitlines()
        table = itertools.takewhile(_is_of_table, lines)
        yield f"**{title.removeprefix('### ')}**", tuple(table)


def _trained():
    """What `train.report` prints of every variant: the header, and its lines."""
    with (_RESULTS / "ablation" / "summary.csv").open(newline="") as file:
        summaries = [_summary(row) for row in csv.DictReader(file)]
    header, rule, *lines = summary.table(summaries, _TARGET)
    return [header, rule], lines


def _summary(row):
    def mean(name):
        error = row[f"{name}_error"]
        return Mean(float(row[name]), float(error) if error else math.nan)

    policy = {name: row[name] for name in summary.POLICY}
    return Summary(
        variant=row["variant"],
        memory=row["memory"],
        policy=policy if any(policy.values()) else {},
        dropped=float(row["dropped"]),
        seeds=int(row["seeds"]),
        test_accuracy=mean("test_accuracy"),
        gain=mean("gain"),
        train_loss=mean("train_loss"),
        cached_bytes=int(row["cached_bytes"]),
        temp_bytes=int(row["temp_bytes"]),
        step_ratio=float(row["step_ratio"]),
    )


def _is_of_table(line):
    return line.startswith(tuple("|│┃┏┡└"))


def _tables(lines):
    """The tables among lines, each with the last line before it that is not empty."""
    title = ""
    for is_table, group in itertools.groupby(lines, _is_of_table):
        own = list(group)
        if is_table:
            yield title, tuple(own)
        else:
            title = ([""] + [line for line in own if line])[-1]


def _is_trained(table):
    return table[0].startswith("| variant | dropped |")


class ReadmeTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        text = (_ROOT / "README.md").read_text()
        self.tables = [
            (title if title.startswith("**") else "", table)
            for title, table in _tables(text.splitlines())
            if any(character.isdigit() for line in table for character in line)
        ]

    def test_every_table_is_whole_and_under_its_title(self):
        known = {_compared(), *_allocated()}
        for title, table in self.tables:
            with self.subTest(title):
                if not _is_trained(table):
                    self.assertIn((title, table), known)

    def test_variants_that_were_trained_are_as_the_report_has_them(self):
        (table,) = [table for _, table in self.tables if _is_trained(table)]
        head, lines = _trained()
        self.assertEqual(list(table[:2]), head)
        chosen = list(table[2:])
        self.assertEqual(chosen, [line for line in lines if line in chosen])
        self.assertIn("`baseline`", chosen[0])

    def test_there_is_one_of_each_command(self):
        tables = set(self.tables)
        self.assertIn(_compared(), tables)
        self.assertNotEmpty(tables & set(_allocated()))


class PageTest(absltest.TestCase):
    def test_tables_of_results_md_are_those_of_the_reports(self):
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


if __name__ == "__main__":
    absltest.main()
