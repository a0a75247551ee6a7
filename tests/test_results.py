"""The tables of the README say what the files under docs/results/ say."""

import io
import itertools
import json
from pathlib import Path

import rich.console
from absl.testing import absltest

from benchmarks import memory, workloads
from train import compare

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
                self.assertIn((title, table), known)

    def test_there_is_one_of_each_command(self):
        tables = set(self.tables)
        self.assertIn(_compared(), tables)
        self.assertNotEmpty(tables & set(_allocated()))


if __name__ == "__main__":
    absltest.main()
