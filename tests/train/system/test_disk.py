"""Room for what a run writes, and what is told where there is too little."""

import shutil
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from absl.testing import absltest, parameterized

from train.system.disk import CheckpointError, check_room, check_writable

_MIB = 2**20


def _files(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def _disk(free):
    return mock.patch.object(shutil, "disk_usage", return_value=mock.Mock(free=free))


class DiskTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.root = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.directory = self.root / "checkpoints"

    def test_the_directory_is_made_and_left_empty(self):
        directory = self.root / "a" / "b"
        for _ in range(2):
            check_writable(directory, 1000)
            self.assertEmpty(list(directory.iterdir()))
        self.assertEqual([path.name for path in self.root.iterdir()], ["a"])

    def test_what_is_there_is_left_alone(self):
        (self.directory / "1").mkdir(parents=True)
        (self.directory / "1" / "file").write_bytes(b"content")
        before = _files(self.root)
        check_writable(self.directory, 1000)
        self.assertEqual(_files(self.root), before)

    @parameterized.parameters("file", "file/checkpoints", "file/a/b")
    def test_below_a_file(self, name):
        (self.root / "file").write_text("content")
        directory = self.root / name
        with pytest.raises(CheckpointError, match=f"Cannot write to {directory}:"):
            check_writable(directory, 0)
        self.assertEqual(_files(self.root), {"file": b"content"})

    def test_a_disk_that_cannot_be_written(self):
        with (
            mock.patch.object(
                tempfile, "TemporaryFile", side_effect=PermissionError(13, "denied")
            ),
            pytest.raises(CheckpointError, match="denied"),
        ):
            check_writable(self.directory, 0)

    @parameterized.parameters(0, 1, 3 * _MIB, 40 * _MIB + 1)
    def test_four_less_what_is_there(self, there):
        size = 10 * _MIB
        (self.directory / "1" / "state").mkdir(parents=True)
        with (self.directory / "1" / "state" / "file").open("wb") as file:
            file.truncate(there)
        needed = max(0, 4 * size - there)
        with _disk(needed):
            check_writable(self.directory, size)
        if needed:
            message = (
                f"room for {(needed - 1) / _MIB:,.0f} MiB.*{needed / _MIB:,.0f} MiB"
            )
            with _disk(needed - 1), pytest.raises(CheckpointError, match=message):
                check_writable(self.directory, size)

    @parameterized.parameters(
        (0, "0 bytes"),
        (1023, "1,023 bytes"),
        (1024, "1 KiB"),
        (300_000, "293 KiB"),
        (5 * _MIB, "5 MiB"),
        (1234 * _MIB, "1.2 GiB"),
        (2**50, "1,048,576 GiB"),
    )
    def test_room_is_told_in_a_unit_of_its_size(self, free, told):
        with _disk(free):
            check_room(self.root, free)
            with pytest.raises(CheckpointError) as raised:
                check_room(self.root, 2**60)
        for part in (f"{self.root} has room for {told}, ", "1,073,741,824 GiB", "--wo"):
            self.assertIn(part, str(raised.value))

    def test_room_where_nothing_is(self):
        with pytest.raises(CheckpointError, match=str(self.directory)):
            check_room(self.directory, 0)


if __name__ == "__main__":
    absltest.main()
