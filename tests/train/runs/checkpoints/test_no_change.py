import shutil
from unittest import mock

import pytest
from absl.testing import absltest, parameterized

from tests.train.runs.checkpoints import cases
from train.system.disk import CheckpointError


class NoChangeTest(cases.SavedCheckpointsTest):
    @parameterized.parameters(1, 2)
    def test_a_step_that_is_there_is_not_saved_again(self, step):
        before = cases.snapshot(self.root)
        with self.open() as checkpoints:
            checkpoints.save(step, cases.state(7), {"other": 1}, 0.5)
            self.assertIsNone(checkpoints.best_step())
        self.assertEqual(cases.snapshot(self.root), before)

    def test_a_step_under_way_is_not_saved_again(self):
        with self.open() as checkpoints:
            self.save(checkpoints, 3)
            checkpoints.save(3, cases.state(7), {"other": 1}, 0.5)
        self.assert_intact(2, 3)

    def test_reading_changes_nothing(self):
        for name in ("7.orbax-checkpoint-tmp", "8.orbax-checkpoint-tmp-1"):
            shutil.copytree(self.directory / "2", self.directory / name)
        before = cases.snapshot(self.root)
        with self.open(read_only=True) as checkpoints:
            self.assertEqual(checkpoints.steps(), [1, 2])
            self.assertIsNone(checkpoints.best_step())
            self.assert_restores(checkpoints.restore(1, cases.abstract_state()), 1)
            step, *result = checkpoints.restore_latest(cases.abstract_state())
            self.assertEqual(step, 2)
            self.assert_restores(result, 2)
        self.assertEqual(cases.snapshot(self.root), before)
        self.assertEmpty(self.said)

    def test_a_reader_makes_no_directory(self):
        directory = self.root / "a" / "b"
        with self.open(directory, read_only=True) as checkpoints:
            self.assertEqual(checkpoints.steps(), [])
            self.assertIsNone(checkpoints.best_step())
            self.assertIsNone(checkpoints.restore_latest(cases.abstract_state()))
        self.assertFalse(directory.parent.exists())

    def test_a_writer_makes_it(self):
        directory = self.root / "a" / "b"
        with self.open(directory):
            self.assertTrue(directory.is_dir())
        self.assertEmpty(list(directory.iterdir()))

    def test_half_written_ones_are_told_and_removed(self):
        before = cases.snapshot(self.directory)
        halves = []
        for name in ("7.orbax-checkpoint-tmp", "8.orbax-checkpoint-tmp-1"):
            halves.append(self.directory / name)
            shutil.copytree(self.directory / "2", halves[-1])
        with self.open() as checkpoints:
            self.assertEqual(checkpoints.steps(), [1, 2])
        self.assertLen(self.said, 2)
        for line, path in zip(self.said, halves, strict=True):
            self.assertIn(f"{path} was not written to its end", line)
        after = cases.snapshot(self.directory)
        self.assertEqual(after.pop(".")[0], before.pop(".")[0])
        self.assertEqual(after, before)

    def test_a_half_written_one_that_cannot_be_removed_is_told(self):
        half = self.directory / "7.orbax-checkpoint-tmp"
        half.mkdir()
        with (
            mock.patch.object(shutil, "rmtree", side_effect=PermissionError(13, "no")),
            pytest.raises(CheckpointError, match=f"Cannot remove {half}"),
        ):
            self.open()
        self.assert_intact(1, 2)


if __name__ == "__main__":
    absltest.main()
