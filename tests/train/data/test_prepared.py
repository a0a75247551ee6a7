"""Datasets that TFDS has prepared: what is read, and what is refused."""

import contextlib
import io
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import chex
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from PIL import Image

from tests.data import write_tiny_datasets as tiny
from train import data
from train.data import prepared

_TINY = str(tiny.DIRECTORY)


def _directory(test):
    """A new directory, which is deleted after the test."""
    return test.enterContext(tempfile.TemporaryDirectory())


class PreparedTest(parameterized.TestCase):
    @parameterized.parameters("cifar10", "cifar100")
    def test_small_datasets_are_what_was_written(self, name):
        dataset, info = data.load(name, _TINY, 32, "none"), data.info(name, _TINY)
        self.assertEqual((info.train_examples, info.test_examples), (48, 16))
        for split, source in (("train", dataset.train), ("test", dataset.test)):
            written = [raw for _, raw in getattr(tiny, name)(split)]
            expected = {
                np.asarray(Image.open(io.BytesIO(raw["image"]))).tobytes(): raw["label"]
                for raw in written
            }
            found = {raw["image"].tobytes(): raw["label"] for raw in source}
            self.assertEqual(found, expected)
        again = data.load(name, _TINY, 64, "shift")
        self.assertIs(again.train, dataset.train)  # decoded once
        chex.assert_shape(again.test_image(again.test[0]), (64, 64, 3))

    def test_imagenet_is_what_was_written(self):
        dataset = data.load("imagenet2012", _TINY, 32, "resized_crop")
        for split, source in (("train", dataset.train), ("validation", dataset.test)):
            written = {
                raw["image"]: raw["label"] for _, raw in tiny.imagenet2012(split)
            }
            self.assertEqual({raw["image"]: raw["label"] for raw in source}, written)
            self.assertLen(source, len(written))

    @parameterized.product(
        name=("digits", "cifar10", "imagenet2012"), augmentation=data.AUGMENTATIONS
    )
    def test_every_augmentation_is_for_every_dataset(self, name, augmentation):
        dataset = data.load(name, _TINY, 40, augmentation)
        dataset = pickle.loads(pickle.dumps(dataset))  # as workers get it
        channels = data.info(name).channels
        for raw in itertools.islice(dataset.train, 6):
            image = dataset.train_image(raw, np.random.default_rng(0))
            chex.assert_shape([image, dataset.test_image(raw)], (40, 40, channels))
            chex.assert_type([image, dataset.test_image(raw)], np.uint8)

    def test_the_script_writes_what_is_committed(self):
        with mock.patch.object(sys, "stderr", io.StringIO()):
            directory = _directory(self)
            tiny.write(directory)
        for name in ("cifar10", "cifar100", "imagenet2012"):
            one, other = (
                prepared.newest_version(name, directory),
                prepared.newest_version(name, _TINY),
            )
            ours, theirs = (
                prepared.EncodedExamples(each, "train", 1000) for each in (one, other)
            )
            self.assertEqual([x["label"] for x in ours], [x["label"] for x in theirs])

    def test_information_needs_no_dataset_and_makes_no_directory(self):
        missing = Path(_directory(self)) / "missing"
        info = data.info("imagenet2012", str(missing))
        self.assertEqual((info.train_examples, info.test_examples), (1281167, 50000))
        self.assertFalse(missing.exists())

    def test_the_default_directory_is_that_of_tfds(self):
        with mock.patch.dict(os.environ, TFDS_DATA_DIR=_TINY):
            self.assertEqual(data.info("cifar10").train_examples, 48)
        with mock.patch.dict(os.environ, TFDS_DATA_DIR=""):
            default = prepared.datasets_directory("")
            self.assertEqual(default, Path.home() / "tensorflow_datasets")

    def test_reading_is_silent_and_needs_no_tensorflow(self):
        program = (
            "import sys; from train import data; assert 'tensorflow_datasets' not in "
            f"sys.modules; data.load('cifar10', {_TINY!r}, 32, 'none'); "
            "assert 'tensorflow' not in sys.modules"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        )
        self.assertEqual(done.stdout + done.stderr, "")


class DamageTest(parameterized.TestCase):
    def _copy(self, name="cifar100"):
        root = Path(_directory(self))
        shutil.copytree(tiny.DIRECTORY / name, root / name)
        return root, prepared.newest_version(name, str(root))

    def _assert_fails(self, root, message, name="cifar100"):
        with pytest.raises(data.DataError, match=message) as caught:
            data.load(name, str(root), 32, "none")
        command = f"python -m train.prepare {name} --data_dir={root}"
        self.assertIn(command, str(caught.value))

    def test_missing(self):
        root = _directory(self)
        self._assert_fails(root, "There is no prepared 'cifar100' in " + root)

    def test_other_format(self):
        root, directory = self._copy()
        path = directory / "dataset_info.json"
        path.write_text(path.read_text().replace("array_record", "tfrecord"))
        self._assert_fails(root, "in the format tfrecord")

    def test_description_that_is_damaged(self):
        root, directory = self._copy()
        (directory / "dataset_info.json").write_text("{")
        self._assert_fails(root, "description of the dataset .* cannot be read")

    def test_split_that_is_missing(self):
        root, directory = self._copy()
        path = directory / "dataset_info.json"
        description = json.loads(path.read_text())
        description["splits"] = [
            each for each in description["splits"] if each["name"] == "train"
        ]
        path.write_text(json.dumps(description))
        self._assert_fails(root, "no split 'test', but 'train'")

    @parameterized.product(name=("cifar100", "imagenet2012"), split=("train", "test"))
    def test_split_that_is_empty(self, name, split):
        root, directory = self._copy(name)
        path = directory / "dataset_info.json"
        description = json.loads(path.read_text())
        for each in description["splits"]:
            if (each["name"] == "train") == (split == "train"):
                each["shardLengths"] = ["0"]
        path.write_text(json.dumps(description))
        self._assert_fails(root, "Split '.*' of the dataset .* has no examples", name)

    @parameterized.parameters(
        *(-1, 1000, 10**9, 3.0, b"7", "7", True, None, ([3],), ([3, 4],)),
        np.int64(-1),
    )
    def test_labels_that_are_none_of_the_classes(self, label):
        root, _ = self._copy("imagenet2012")
        examples = [
            dict(each) for each in data.load("imagenet2012", _TINY, 32, "none").train
        ]
        examples[5]["label"] = label

        class Source(list):
            def __getitems__(self, indices):
                return [self[index] for index in indices]

        source = data.load("imagenet2012", str(root), 32, "none").train
        source.__dict__["_source"] = Source(examples)
        self.assertLen([source[i] for i in range(5)], 5)
        for read in (lambda: source[5], lambda: source.many(range(6))):
            with pytest.raises(data.DataError) as caught:
                read()
            for part in (
                "Example 5 of split 'train'",
                "imagenet2012-train.array_record-0000",
                f"has the label {label!r}",
                "whole numbers from 0 to 999",
            ):
                self.assertIn(part, str(caught.value))

    def _with_image(self, image):
        """A training set of which the 6th example has another image."""
        dataset = data.load("imagenet2012", _TINY, 32, "none")
        examples = [dict(each) for each in dataset.train]
        examples[5] |= {"image": image}

        class Source(list):
            def __getitems__(self, indices):
                return [self[index] for index in indices]

        dataset.train.__dict__["_source"] = Source(examples)
        return dataset

    @parameterized.parameters(None, 3, "text", ([1, 2],))
    def test_what_is_no_encoded_image(self, image):
        source = self._with_image(image).train
        for read in (lambda: source[5], lambda: source.many(range(6))):
            with pytest.raises(
                data.DataError, match=r"Example 5 of split 'train' in .*, in .*-0000.*"
            ) as caught:
                read()
            self.assertIn("has no encoded image", str(caught.value))

    def test_an_image_that_is_damaged_is_named(self):
        dataset = self._with_image(b"no image")
        batches = data.training_batches(dataset, 16, 0)
        with (
            contextlib.closing(batches),
            pytest.raises(data.DataError) as caught,
        ):
            list(itertools.islice(batches, 3))
        self.assertStartsWith(str(caught.value), "Example 5 of split 'train' in ")
        self.assertIn("neither JPEG nor PNG", str(caught.value))

    @parameterized.parameters("~nosuchuser/data", "a" * 5000, "/" + "a/" * 5000, "a\0b")
    def test_a_directory_that_cannot_be(self, name):
        for call in (data.info, lambda *args: data.load(*args, 32, "none")):
            with pytest.raises(data.DataError, match="is no name of a file") as error:
                call("cifar10", name)
            self.assertLess(len(str(error.value)), 500)

    @parameterized.parameters(KeyError("label"), ValueError("no Example"))
    def test_what_is_no_example(self, error):
        source = data.load("imagenet2012", _TINY, 32, "none").test

        class Source:
            def __getitem__(self, index):
                raise error

            __getitems__ = __getitem__

        source.__dict__["_source"] = Source()
        for read in (lambda: source[0], lambda: source.many([0])):
            with pytest.raises(data.DataError, match="Example 0 of split 'validation'"):
                read()

    @parameterized.parameters(
        ("features.json", "tensorflow_datasets.core.features.text", "this.Foo"),
        ("features.json", "tensorflow_datasets.core.features.", "os."),
        ("features.json", "{", "[" * 10**5),
        ("dataset_info.json", '"48"', '"-5"'),
        ("dataset_info.json", '"48"', '"many"'),
        ("dataset_info.json", "{", "[" * 10**5),
    )
    def test_a_description_of_something_else(self, name, old, new):
        """And no module is imported that it names."""
        root, directory = self._copy()
        path = directory / name
        content = path.read_text()
        self.assertIn(old, content)
        path.write_text(content.replace(old, new))
        with mock.patch.dict(sys.modules):
            sys.modules.pop("this", None)
            with pytest.raises(data.DataError) as error:
                data.load("cifar100", str(root), 32, "none")
            self.assertNotIn("this", sys.modules)
        self.assertIn(str(directory), str(error.value))
        self.assertLess(len(str(error.value)), 1000)

    def test_file_that_is_missing(self):
        root, directory = self._copy("imagenet2012")
        next(directory.glob("*validation*")).unlink()
        self._assert_fails(root, "validation.* is missing", "imagenet2012")

    @parameterized.parameters(0, 65536, 100_000)
    def test_file_that_is_cut_short(self, length):
        root, directory = self._copy()
        os.truncate(next(directory.glob("*train*")), length)
        self._assert_fails(root, "train.* is damaged")

    def test_fewer_examples_than_described(self):
        root, directory = self._copy()
        path = directory / "dataset_info.json"
        path.write_text(path.read_text().replace('"48"', '"50"'))
        self._assert_fails(root, "has 48 of 50 examples")

    @parameterized.parameters("cifar100", "imagenet2012")
    def test_examples_that_are_damaged(self, name):
        root, directory = self._copy(name)
        path = next(directory.glob("*train*"))
        content = bytearray(path.read_bytes())
        content[4000:12000] = bytes(8000)
        path.write_bytes(content)
        with pytest.raises(data.DataError, match=r"Example .* cannot be read"):
            list(data.load(name, str(root), 32, "none").train)


if __name__ == "__main__":
    absltest.main()
