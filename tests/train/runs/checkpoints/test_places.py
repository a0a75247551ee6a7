import io
import shutil
import sys
from unittest import mock

import pytest
from absl.testing import absltest, parameterized

from tests.train.runs.checkpoints import cases
from train.system import library_output
from train.system.disk import CheckpointError


class PlacesTest(cases.SavedCheckpointsTest):
    """Directories that users moved, linked, added or lost."""

    def test_a_checkpoint_on_another_disk_is_read_and_left_there(self):
        elsewhere = self.root / "elsewhere"
        (self.directory / "2").rename(elsewhere)
        (self.directory / "2").symlink_to(elsewhere)
        before = cases.snapshot(elsewhere)
        self.assert_intact(1, 2)
        with self.open() as checkpoints:
            step, *result = checkpoints.restore_latest(cases.abstract_state())
            self.assertEqual(step, 2)
            self.assert_restores(result, 2)
            for step in (3, 4):
                self.save(checkpoints, step)
        self.assert_intact(3, 4)
        self.assertFalse((self.directory / "2").is_symlink())
        self.assertEqual(cases.snapshot(elsewhere), before)
        self.assertEmpty(self.said)

    def test_a_link_to_a_disk_that_is_not_there_is_told(self):
        shutil.rmtree(self.directory / "2")
        (self.directory / "2").symlink_to(self.root / "nowhere")
        with self.open() as checkpoints:
            step, *_ = checkpoints.restore_latest(cases.abstract_state())
        self.assertEqual(step, 1)
        self.assertIn("step 2 is damaged", self.said[0])

    def test_one_that_is_removed_while_it_is_read_is_told_as_gone(self):
        with self.open(read_only=True) as checkpoints:
            shutil.rmtree(self.directory / "2")
            with pytest.raises(CheckpointError, match="it is gone: a run that goes on"):
                checkpoints.restore(2, cases.abstract_state())

    @parameterized.parameters("directory", "file")
    def test_what_is_no_checkpoint_is_told(self, kind):
        path = self.directory / "7"
        path.mkdir() if kind == "directory" else path.write_text("7")
        with mock.patch.object(sys, "stderr", io.StringIO()) as printed:
            library_output.silence_libraries()
            with self.open() as checkpoints:
                step, *_ = checkpoints.restore_latest(cases.abstract_state())
                self.save(checkpoints, 3)
        self.assertEqual(step, 2)
        self.assertIn("step 7 is damaged", self.said[0])
        self.assertEqual(printed.getvalue(), "")
        self.assert_intact(2, 3)

    @parameterized.parameters("007", "7x", "-7", "\u0667")
    def test_other_names_are_left_alone(self, name):
        (self.directory / name).mkdir()
        with self.open() as checkpoints:
            self.save(checkpoints, 3)
        self.assertTrue((self.directory / name).is_dir())
        self.assertEqual(checkpoints.steps(), [2, 3])
        self.assertEmpty(self.said)

    def test_older_ones_that_a_kill_left_are_removed(self):
        for step in (10, 20):
            with self.open() as checkpoints:
                self.save(checkpoints, step, accuracy=step / 100)
            for number in (1, 2):
                shutil.copytree(
                    self.saved / "checkpoints" / str(number),
                    self.directory / str(number),
                    dirs_exist_ok=True,
                )
        (self.directory / ".1.old").mkdir()
        with self.open() as checkpoints:
            self.assertEqual(checkpoints.steps(), [1, 2, 10, 20])
            checkpoints.restore_latest(cases.abstract_state())
        names = sorted(path.name for path in self.directory.iterdir())
        self.assertEqual(names, ["10", "20"])
        self.assertEmpty(self.said)

    def test_older_ones_are_kept_where_newer_ones_are_damaged(self):
        with self.open() as checkpoints:
            self.save(checkpoints, 3)
        shutil.copytree(self.saved / "checkpoints" / "1", self.directory / "1")
        for step in (2, 3):
            cases.flip(self.directory / str(step) / "checksums.json")
        with self.open() as checkpoints:
            step, *_ = checkpoints.restore_latest(cases.abstract_state())
        self.assertEqual(step, 1)


if __name__ == "__main__":
    absltest.main()
