"""Whose directory it is, and what is left of one that is refused."""

import tempfile
from pathlib import Path

import pytest
from absl.testing import absltest, parameterized

from configs import digits_vit
from train.config.config import ConfigError
from train.runs import lock, records, workdir

_ROW = dict.fromkeys(records.COLUMNS, 1)


class WorkdirTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.root = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.workdir = self.root / "a" / "b"
        self.config = digits_vit.get_config()

    def _fill(self, checkpoint, metrics=True):
        (self.workdir / "checkpoints" / checkpoint).mkdir(parents=True)
        if metrics:
            with records.Records(self.workdir, 0) as log:
                log.append(_ROW)

    @parameterized.parameters("", "007", "7x", "7.orbax-checkpoint-tmp", "-7")
    def test_metrics_without_a_checkpoint_are_left_alone(self, name):
        self._fill(name)
        with pytest.raises(ConfigError, match="and no checkpoint to go on from"):
            workdir.check_can_start(self.workdir, self.config)

    def test_a_file_is_no_checkpoint(self):
        self._fill("")
        (self.workdir / "checkpoints" / "7").touch()
        with pytest.raises(ConfigError, match="and no checkpoint to go on from"):
            workdir.check_can_start(self.workdir, self.config)

    @parameterized.parameters(True, False)
    def test_a_checkpoint_is_one_of_this_config(self, metrics):
        self._fill("7", metrics)
        workdir.write_config(self.workdir, self.config)
        workdir.check_can_start(self.workdir, self.config)
        self.config.seed = 7
        with pytest.raises(ConfigError, match=r"Changed:\n  config\.seed: 42 ->"):
            workdir.check_can_start(self.workdir, self.config)

    def test_without_either_any_config_will_do(self):
        workdir.check_can_start(self.workdir, self.config)
        self._fill("7.orbax-checkpoint-tmp", metrics=False)
        workdir.check_can_start(self.workdir, self.config)
        self.assertFalse((self.workdir / "config.json").exists())  # nor is it claimed

    def test_one_that_is_refused_leaves_nothing(self):
        with workdir.created_and_locked(self.workdir, print):
            (self.workdir / "checkpoints").mkdir()
        self.assertEmpty(list(self.root.iterdir()))

    @parameterized.parameters("config.json", "checkpoints/7/file")
    def test_one_that_is_used_stays(self, name):
        with workdir.created_and_locked(self.workdir, print):
            path = self.workdir / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        self.assertTrue(path.exists())

    def test_one_that_was_there_stays(self):
        self.workdir.mkdir(parents=True)
        with workdir.created_and_locked(self.workdir, print):
            pass
        self.assertTrue(self.workdir.is_dir())
        self.assertEmpty(list(self.workdir.iterdir()))

    def test_one_that_is_held_or_cannot_be_made_is_told(self):
        with (
            workdir.created_and_locked(self.workdir, print),
            pytest.raises(lock.LockedError, match="is being written by process"),
            workdir.created_and_locked(self.workdir, print),
        ):
            pass
        (self.root / "file").touch()
        with (
            pytest.raises(ConfigError, match=r"Cannot write to .*file/c"),
            workdir.created_and_locked(self.root / "file" / "c", print),
        ):
            pass

    @parameterized.parameters("[]", "{", '{"seed": ' + "9" * 5000 + "}", '{"a.b": 1}')
    def test_a_config_that_is_damaged_is_told(self, content):
        self._fill("7")
        (self.workdir / "config.json").write_text(content)
        with pytest.raises(ConfigError, match="holds no run that can be read") as error:
            workdir.check_can_start(self.workdir, self.config)
        self.assertLess(len(str(error.value)), 500)

    def test_a_difference_of_a_megabyte_is_told_in_short(self):
        self._fill("7")
        workdir.write_config(self.workdir, self.config)
        self.config.init_from = "\x1b" * 10**6
        with pytest.raises(ConfigError, match="init_from: '' -> ") as error:
            workdir.check_can_start(self.workdir, self.config)
        self.assertLess(len(str(error.value)), 1000)


if __name__ == "__main__":
    absltest.main()
