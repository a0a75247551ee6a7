import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

from tests.train.runs.checkpoints import cases
from train.runs.checkpoints import checksums
from train.system.disk import CheckpointError

_MIB = 2**20


def _disk(free):
    return mock.patch.object(shutil, "disk_usage", return_value=mock.Mock(free=free))


class WritingFailsTest(cases.SavedCheckpointsTest):
    def test_too_little_room(self):
        state = {"w": jnp.zeros(3 * _MIB // 4, jnp.float32)}
        with self.open() as checkpoints:
            before = cases.files(self.root)
            with (
                _disk(3 * _MIB - 1),
                pytest.raises(CheckpointError, match=r"3 MiB.*3 MiB"),
            ):
                checkpoints.save(3, state, {}, 0.9)
            self.assertEqual(checkpoints.steps(), [1, 2])
            self.assertIsNone(checkpoints.best_step())
        self.assertEqual(cases.files(self.root), before)
        self.assert_intact(1, 2)

    def test_room_that_is_made_is_used(self):
        with self.open() as checkpoints:
            with _disk(10), pytest.raises(CheckpointError):
                self.save(checkpoints, 3)
            self.save(checkpoints, 3)
        self.assert_intact(2, 3)

    def test_just_enough_room(self):
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(cases.state()))
        with self.open() as checkpoints, _disk(size):
            self.save(checkpoints, 3)
        self.assert_intact(2, 3)

    @parameterized.parameters("nothing", "a file")
    def test_a_directory_that_has_become(self, something_else):
        aside = self.directory.rename(self.root / "aside")
        with self.open(aside) as checkpoints:
            aside.rename(self.directory)
            if something_else == "a file":
                aside.touch()
            with pytest.raises(CheckpointError, match=str(aside)):
                self.save(checkpoints, 3)
        if something_else == "a file":
            self.assertEqual(aside.read_bytes(), b"")
        self.assert_intact(1, 2)

    def _run(self, by):
        """Saves a step; then makes the call that reports a failure, named `by`."""
        with self.open() as checkpoints:
            self.save(checkpoints, 3)
            if by == "wait":
                checkpoints.wait()
            if by == "save":
                self.save(checkpoints, 4)
            if by == "another":
                raise ZeroDivisionError("of the run")

    @parameterized.parameters("wait", "save", "exit")
    def test_an_error_in_the_background_is_told_by_the_next(self, by):
        reason = OSError(28, "No space left on device")
        with (
            mock.patch.object(checksums, "write", side_effect=reason),
            pytest.raises(CheckpointError, match="No space left") as raised,
        ):
            self._run(by)
        self.assertIn(str(self.directory), str(raised.value))
        self.assert_intact(1, 2)
        with self.open() as checkpoints:
            self.assertEqual(checkpoints.steps(), [1, 2])
            self.save(checkpoints, 3)
        (line,) = self.said
        self.assertIn("was not written to its end", line)
        self.assert_intact(2, 3)

    def test_another_error_is_not_hidden(self):
        with (
            mock.patch.object(checksums, "write", side_effect=OSError(28, "")),
            pytest.raises(ZeroDivisionError, match="of the run") as raised,
        ):
            self._run("another")
        self.assertIsNone(raised.value.__cause__)
        self.assert_intact(1, 2)

    def test_another_error_lets_the_writing_end(self):
        with pytest.raises(ZeroDivisionError, match="of the run"):
            self._run("another")
        self.assert_intact(2, 3)


if __name__ == "__main__":
    absltest.main()
