import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from absl.testing import absltest, parameterized

from tests.train.runs.checkpoints import cases
from train.system.disk import CheckpointError


def _truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def _empty(path):
    os.truncate(path, 0)


_DAMAGES = {
    "flip": cases.flip,
    "truncate": _truncate,
    "empty": _empty,
    "delete": Path.unlink,
}


class DamagedTest(cases.SavedCheckpointsTest):
    def _names(self):
        """Returns the names of a checkpoint's files, without Orbax's final mark."""
        step = self.directory / "2"
        names = [
            str(path.relative_to(step))
            for path in sorted(step.rglob("*"))
            if path.is_file() and path.name != "commit_success.txt"
        ]
        self.assertContainsSubset({"_CHECKPOINT_METADATA", "checksums.json"}, names)
        self.assertGreater(len(names), 10)
        return names

    @parameterized.parameters(
        # Every file in two ways; which of them does not depend on the file.
        ("flip", slice(None)),
        ("truncate", slice(0, None, 3)),
        ("empty", slice(1, None, 3)),
        ("delete", slice(2, None, 3)),
    )
    def test_the_one_before_any_damaged_file_is_used(self, damage, which):
        first = cases.snapshot(self.directory / "1")
        for name in self._names()[which]:
            with self.subTest(name), tempfile.TemporaryDirectory() as root:
                self.said.clear()
                directory = Path(root) / "checkpoints"
                shutil.copytree(self.directory, directory)
                _DAMAGES[damage](directory / "2" / name)
                second = cases.snapshot(directory / "2")
                with self.open(directory) as checkpoints:
                    with pytest.raises(CheckpointError, match="2 is damaged"):
                        checkpoints.restore(2, cases.abstract_state())
                    self.assertEmpty(self.said)
                    self.assertEqual(cases.snapshot(directory / "2"), second)
                    step, *result = checkpoints.restore_latest(cases.abstract_state())
                    self.assertEqual(step, 1)
                    self.assert_restores(result, 1)
                    self.assertEqual(checkpoints.steps(), [1])
                (line,) = self.said
                aside = Path(root) / "damaged" / "2"
                for part in ("step 2 is damaged", name, str(aside), "of step 1 used"):
                    self.assertIn(part, line)
                self.assertEqual(cases.snapshot(aside), second)
                self.assertEqual(cases.snapshot(directory / "1"), first)
                self.assertEqual([p.name for p in directory.iterdir()], ["1"])
                self.assertLen(list(Path(root).iterdir()), 2)

    def test_a_reader_only_tells(self):
        cases.flip(self.directory / "2" / self._names()[0])
        before = cases.snapshot(self.root)
        with self.open(read_only=True) as checkpoints:
            with pytest.raises(CheckpointError, match=r"2 is damaged.*--step"):
                checkpoints.restore(2, cases.abstract_state())
            self.assert_restores(checkpoints.restore(1, cases.abstract_state()), 1)
        self.assertEqual(cases.snapshot(self.root), before)

    @parameterized.parameters(*_DAMAGES)
    def test_all_damaged_is_an_error(self, damage):
        for name in ("1/position/metadata", "2/state/_METADATA"):
            _DAMAGES[damage](self.directory / name)
        before = cases.snapshot(self.root)
        with self.open() as checkpoints:
            self.assertEqual(checkpoints.steps(), [1, 2])
            with pytest.raises(CheckpointError) as raised:
                checkpoints.restore_latest(cases.abstract_state())
            self.assertEqual(checkpoints.steps(), [1, 2])
        for part in (str(self.directory), "2: state/_METADATA", "1: position/metadata"):
            self.assertIn(part, str(raised.value))
        self.assertEqual(cases.snapshot(self.root), before)
        self.assertEmpty(self.said)

    def test_several_damaged_ones_are_put_aside(self):
        with self.open() as checkpoints:
            self.save(checkpoints, 3, 0.9)
        with self.open() as checkpoints:
            self.save(checkpoints, 4)
        with self.open() as checkpoints:
            self.save(checkpoints, 5)
            self.assertEqual(checkpoints.steps(), [3, 4, 5])
        for step in (4, 5):
            cases.flip(self.directory / f"{step}" / "position" / "metadata")
        with self.open() as checkpoints:
            step, *result = checkpoints.restore_latest(cases.abstract_state())
            self.assertEqual((step, checkpoints.steps()), (3, [3]))
            self.assert_restores(result, 3, 0.9)
            self.assertEqual(checkpoints.best_step(), 3)
        self.assertLen(self.said, 2)
        names = sorted(path.name for path in (self.root / "damaged").iterdir())
        self.assertEqual(names, ["4", "5"])

    def test_the_same_step_again_gets_another_name(self):
        asides = {}
        for turn in range(3):
            with self.open() as checkpoints:
                self.save(checkpoints, 2)
            (self.directory / "2" / "position" / "metadata").write_text(f"{turn}")
            content = cases.snapshot(self.directory / "2")
            with self.open() as checkpoints:
                step, *_ = checkpoints.restore_latest(cases.abstract_state())
            self.assertEqual(step, 1)
            there = sorted((self.root / "damaged").iterdir())
            (new,) = (path for path in there if path not in asides)
            self.assertIn(f"put aside as {new},", self.said[-1])
            asides[new] = content
            for path, expected in asides.items():
                self.assertEqual(cases.snapshot(path), expected)
        self.assert_intact(1)

    def test_a_run_goes_on_with_the_step_that_was_damaged(self):
        cases.flip(self.directory / "2" / "state" / "_METADATA")
        with self.open() as checkpoints:
            checkpoints.restore_latest(cases.abstract_state())
            self.save(checkpoints, 2)
        self.assert_intact(1, 2)

    @parameterized.parameters(None, "{}", '{"version": 1, "step": 2, "files": {}}')
    def test_without_checksums_it_is_damaged(self, text):
        file = self.directory / "2" / "checksums.json"
        file.unlink() if text is None else file.write_text(text)
        with self.open() as checkpoints:
            step, *result = checkpoints.restore_latest(cases.abstract_state())
        self.assertEqual(step, 1)
        self.assert_restores(result, 1)
        self.assertIn("checksums.json", self.said[0])

    @parameterized.product(name=["3", "99999999"], move=[True, False])
    def test_a_step_of_another_name_is_damaged(self, name, move):
        (shutil.move if move else shutil.copytree)(
            self.directory / "2", self.directory / name
        )
        with self.open() as checkpoints:
            with pytest.raises(CheckpointError, match="written as that of step 2"):
                checkpoints.restore(int(name), cases.abstract_state())
            step, *result = checkpoints.restore_latest(cases.abstract_state())
        expected = 1 if move else 2
        self.assertEqual(step, expected)
        self.assert_restores(result, expected)
        self.assertIn("written as that of step 2", self.said[0])
        self.assertTrue((self.root / "damaged" / name).is_dir())

    def test_a_state_with_a_problem_is_damaged(self):
        def problem(step, state, position):
            self.assertEqual(state["step"], step)
            self.assertIn("meter", position)
            return "too large" if state["step"] == 2 else ""

        with self.open(problem=problem) as checkpoints:
            with pytest.raises(CheckpointError, match=r"2 is damaged \(too large\)"):
                checkpoints.restore(2, cases.abstract_state())
            step, *result = checkpoints.restore_latest(cases.abstract_state())
        self.assertEqual(step, 1)
        self.assert_restores(result, 1)
        self.assertIn("step 2 is damaged (too large)", self.said[0])

    def test_checksums_without_a_step_are_read(self):
        """Reads the format of the first version, which left out some files."""
        file = self.directory / "2" / "checksums.json"
        files = json.loads(file.read_text())["files"]
        del files["_CHECKPOINT_METADATA"]
        file.write_text(json.dumps(files))
        self.assert_intact(1, 2)


if __name__ == "__main__":
    absltest.main()
