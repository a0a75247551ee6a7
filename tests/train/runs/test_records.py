import math
import struct
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest, parameterized
from tensorboardX.proto import event_pb2

from train.runs import records
from train.system import files


def _row(step):
    values = [step, step, 0.1 / step, 1 / 3, 0.25, math.pi, 0.5, 0.75, 1234.5, 0.1]
    return dict(zip(records.COLUMNS, values, strict=True))


def _scalars(directory):
    """(step, tag) -> value of the event files, as TFRecords of events."""
    scalars = {}
    for path in sorted(directory.glob("events.*")):
        content, start = path.read_bytes(), 0
        while start < len(content):
            (length,) = struct.unpack("<Q", content[start : start + 8])
            event = event_pb2.Event.FromString(
                content[start + 12 : start + 12 + length]
            )
            start += length + 16
            for value in event.summary.value:
                scalars[event.step, value.tag] = value.simple_value
    return scalars


class RecordsTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.directory = Path(self.enterContext(tempfile.TemporaryDirectory()))

    def test_rows_and_events_can_be_read_back(self):
        with records.Records(self.directory, 0) as log:
            for step in (1, 2):
                log.append(_row(step))
        path = self.directory / "metrics.csv"
        self.assertEqual(records.read(path), [_row(1), _row(2)])
        scalars = _scalars(self.directory / "tensorboard")
        for step in (1, 2):
            for name in records.COLUMNS[2:]:
                expected = np.float32(_row(step)[name])
                self.assertEqual(np.float32(scalars[step, name]), expected)

    def test_rows_after_the_step_gone_on_from_are_dropped(self):
        with records.Records(self.directory, 0) as log:
            for step in (1, 2, 3):
                log.append(_row(step))
        with records.Records(self.directory, 2) as log:
            self.assertEqual(log.rows, [_row(1), _row(2)])
            log.append(_row(4))
        rows = records.read(self.directory / "metrics.csv")
        self.assertEqual(rows, [_row(1), _row(2), _row(4)])

    def test_a_quick_restart_keeps_the_events_before(self):
        for step in (1, 2, 3):
            with records.Records(self.directory, step - 1) as log:
                log.append(_row(step))
        names = {name for _, name in _scalars(self.directory / "tensorboard")}
        steps = {step for step, _ in _scalars(self.directory / "tensorboard")}
        self.assertEqual(steps, {1, 2, 3})
        self.assertLen(names, len(records.COLUMNS[2:]))

    def test_one_of_several_processes_writes(self):
        with records.Records(self.directory, 0, write=False) as log:
            log.append(_row(1))
        self.assertEqual(log.rows, [_row(1)])
        self.assertEmpty(list(self.directory.iterdir()))

    @parameterized.parameters("delete", "empty", "first", "last")
    def test_rows_that_are_lost_come_from_the_checkpoint(self, lost):
        rows = [_row(step) for step in (1, 2, 3)]
        with records.Records(self.directory, 0) as log:
            for row in rows:
                log.append(row)
        path, said = self.directory / records.NAME, []
        lines = path.read_text().splitlines(keepends=True)
        if lost == "delete":
            path.unlink()
        else:
            kept = {"empty": [], "first": lines[:1] + lines[2:], "last": lines[:-1]}
            path.write_text("".join(kept[lost]))
        with records.Records(self.directory, 3, rows, said.append) as log:
            self.assertEqual(log.rows, rows)
        self.assertEqual(records.read(path), rows)
        count = 1 if lost in ("first", "last") else 3
        (line,) = said
        self.assertIn(f"lacks {count} of 3 rows", line)
        with records.Records(self.directory, 3, rows, said.append):
            self.assertLen(said, 1)

    def test_no_file_has_no_rows(self):
        self.assertEqual(records.read(self.directory / "metrics.csv"), [])

    def test_a_write_that_fails_leaves_the_old_file(self):
        path = self.directory / "file"
        files.write_atomically(path, "old")
        with mock.patch("os.fsync", side_effect=OSError), pytest.raises(OSError):  # noqa: PT011
            files.write_atomically(path, "new")
        self.assertEqual(path.read_text(), "old")
        self.assertEqual([p.name for p in self.directory.iterdir()], ["file"])
        files.write_atomically(path, b"new")
        self.assertEqual([p.name for p in self.directory.iterdir()], ["file"])
        self.assertEqual(path.read_text(), "new")


if __name__ == "__main__":
    absltest.main()
