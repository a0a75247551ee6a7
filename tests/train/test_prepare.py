import contextlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import tensorflow_datasets as tfds
from absl.testing import absltest, parameterized

from tests.data import write_tiny_datasets as tiny
from train import prepare


def _run(*names, data_dir=""):
    """The exit status and what is printed, on both channels."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(prepare, "_DATA_DIR", mock.Mock(value=str(data_dir))),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        status = prepare.main(["prepare", *names])
    return status, out.getvalue(), err.getvalue()


def _packages(*present):
    """Makes it look as if of what TFDS needs only these packages were installed."""
    find = importlib.util.find_spec

    def find_spec(name):
        return (name in present or None) if name in prepare._PACKAGES else find(name)

    return mock.patch.object(importlib.util, "find_spec", find_spec)


def _directory(test):
    """A new directory, which is deleted after the test."""
    return test.enterContext(tempfile.TemporaryDirectory())


class _Builder:
    def __init__(self, name, data_dir, error=None):
        self.name, self.data_dir, self.error = name, data_dir, error

    def download_and_prepare(self, file_format):
        if self.error:
            raise self.error
        assert file_format == "array_record"
        shutil.copytree(tiny.DIRECTORY / self.name, self.data_dir / self.name)


class PrepareTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.directory = Path(_directory(self))

    def test_success_says_where_and_a_second_time_that_it_is_there(self):
        version = self.directory / "cifar100" / "3.0.2"
        with (
            _packages(*prepare._PACKAGES),
            mock.patch.object(tfds, "builder", _Builder),
        ):
            done = _run("cifar100", data_dir=self.directory)
        self.assertEqual(done, (0, f"cifar100 is in {version}.\n", ""))
        with _packages():  # which are not needed any more
            done = _run("cifar100", data_dir=self.directory)
        self.assertEqual(done, (0, f"cifar100 is already in {version}.\n", ""))

    def test_digits_need_nothing(self):
        status, out, _ = _run("digits")
        self.assertEqual(status, 0)
        self.assertIn("nothing to prepare", out)

    @parameterized.parameters(
        ((), "Name one dataset: digits, cifar10"),
        (("cifar10", "cifar100"), "Got cifar10 cifar100"),
        (("mnist",), "no dataset 'mnist'; known are 'digits', 'cifar10', 'cifar100'"),
    )
    def test_names_that_are_no_dataset(self, names, message):
        status, out, err = _run(*names)
        self.assertEqual((status, out), (2, ""))
        self.assertIn(message, err)

    @parameterized.parameters((), "tensorflow", "importlib_resources")
    def test_packages_that_are_missing(self, *present):
        with _packages(*present):
            status, _, err = _run("cifar10", data_dir=self.directory)
        self.assertEqual(status, 2)
        self.assertIn('pip install -e ".[prepare]"', err)
        for name in prepare._PACKAGES:
            self.assertEqual(name in err.split("needs")[1], name not in present)
        self.assertEmpty(list(self.directory.iterdir()))

    def test_imagenet_is_fetched_by_hand(self):
        manual = self.directory / "downloads" / "manual"
        status, _, err = _run("imagenet2012", data_dir=self.directory)
        self.assertEqual(status, 2)
        self.assertIn(str(manual), err)
        self.assertIn("https://image-net.org", err)
        self.assertFalse(manual.exists())
        manual.mkdir(parents=True)
        (manual / "ILSVRC2012_img_train.tar").touch()
        _, _, err = _run("imagenet2012", data_dir=self.directory)
        self.assertIn("Missing there: ILSVRC2012_img_val.tar.", err)
        (manual / "ILSVRC2012_img_val.tar").touch()
        with (
            _packages(*prepare._PACKAGES),
            mock.patch.object(tfds, "builder", _Builder),
        ):
            status, out, _ = _run("imagenet2012", data_dir=self.directory)
        self.assertEqual(status, 0)
        self.assertIn(f"{self.directory}/imagenet2012/5.1.0", out)

    def test_failures_of_tfds_are_one_line(self):
        def builder(name, data_dir):
            return _Builder(name, data_dir, ConnectionError("no network"))

        with _packages(*prepare._PACKAGES), mock.patch.object(tfds, "builder", builder):
            status, out, err = _run("cifar10", data_dir=self.directory)
        self.assertEqual((status, out), (2, ""))
        expected = "error: TFDS cannot prepare cifar10: ConnectionError: no network\n"
        self.assertEqual(err, expected)

    def test_what_is_there_and_damaged_is_an_error(self):
        shutil.copytree(tiny.DIRECTORY / "cifar10", self.directory / "cifar10")
        file = next(self.directory.glob("cifar10/*/*test*"))
        os.truncate(file, 0)
        status, _, err = _run("cifar10", data_dir=self.directory)
        self.assertEqual(status, 2)
        self.assertIn(file.name, err)

    @parameterized.parameters((["digits"], 0), (["digits", "--bad"], 2), ([], 2))
    def test_the_command_line(self, arguments, status):
        done = subprocess.run(
            [sys.executable, "-m", "train.prepare", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        self.assertEqual(done.returncode, status)
        self.assertNotIn("Traceback", done.stderr)


if __name__ == "__main__":
    absltest.main()
