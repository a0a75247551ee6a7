"""The tables of the README say what the files under docs/results/ say."""

import io
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
    """What `make train` prints."""
    results = {
        name: compare.Measurements(**fields)
        for name, fields in json.loads((_RESULTS / "digits.json").read_text()).items()
    }
    text = io.StringIO()
    rich.console.Console(file=text, width=100).print(compare.table(results, _TARGET))
    return text.getvalue().splitlines()


def _allocated():
    """What `benchmarks.memory` prints."""
    rows = json.loads((_RESULTS / "memory.json").read_text())
    results = [memory.Result(**row) for row in rows]
    lines = []
    for workload in workloads.WORKLOADS:
        own = (workload.model, workload.image_size, workload.batch, workload.dtype)
        of_workload = [
            result
            for result in results
            if (result.model, result.image_size, result.batch, result.dtype) == own
        ]
        lines += memory.markdown(workload, of_workload).splitlines()
    return lines


class ReadmeTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        text = (_ROOT / "README.md").read_text()
        self.lines = text.splitlines()

    def test_every_number_of_a_table_is_in_a_file(self):
        known = {*_compared(), *_allocated()}
        rows = [
            line
            for line in self.lines
            if line.startswith(("|", "│")) and any(map(str.isdigit, line))
        ]
        self.assertGreater(len(rows), 10)
        for row in rows:
            self.assertIn(row, known)

    def test_every_table_is_there(self):
        wanted = {"make train": _compared(), "memory": _allocated()}
        for name, lines in wanted.items():
            with self.subTest(name):
                shared = set(lines) & set(self.lines)
                self.assertGreaterEqual(
                    sum(any(map(str.isdigit, line)) for line in shared), 4
                )


if __name__ == "__main__":
    absltest.main()
