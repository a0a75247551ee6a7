"""The datasets that a config can name.

A dataset has two random-access sources of examples, one for training and one for
evaluation, and a function for each that makes an image of an example.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from train.data import arrays, augment, digits, images, prepared
from train.data.arrays import DecodedExamples, Source


@dataclasses.dataclass(frozen=True)
class Info:
    """Facts about a dataset that are known without reading its examples.

    Attributes:
      num_classes: labels are in [0, num_classes).
      channels: number of channels of an image.
      train_examples: number of examples to train on.
      test_examples: number of examples to evaluate on.
      mean: mean of the training pixels, in [0, 255], for each channel.
      std: standard deviation of the training pixels, for each channel.
    """

    num_classes: int
    channels: int
    train_examples: int
    test_examples: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset that is ready to be read.

    Attributes:
      train: the examples to train on, each with an `"image"` and a `"label"`.
      test: the examples to evaluate on, likewise.
      train_image: maps a training example and a random generator to an augmented image,
        uint8 `(image_size, image_size, channels)`.
      test_image: maps a test example to an image of the same shape.
    """

    train: Source
    test: Source
    train_image: Callable[[Any, np.random.Generator], np.ndarray]
    test_image: Callable[[Any], np.ndarray]


@dataclasses.dataclass(frozen=True)
class _Entry:
    """An entry of the table of datasets.

    Attributes:
      info: facts, with the published numbers of examples.
      splits: TFDS's names of the training and the test split; empty for a dataset that
        comes with a package.
      open: opens both splits; `(name, data_dir, splits) -> (train, test)`.
    """

    info: Info
    splits: tuple[str, ...]
    open: Callable[[str, str, tuple[str, ...]], tuple[Source, Source]]


def info(name: str, data_dir: str = "") -> Info:
    """Returns the facts about a dataset, without reading its examples.

    The numbers of examples are those of the prepared dataset if there is one, else the
    published ones.

    Args:
      name: one of `DATASETS`.
      data_dir: directory of prepared datasets; TFDS's default directory if empty.

    Raises:
      DataError: `data_dir` cannot be a path, or the prepared dataset's description is
        damaged.
    """
    entry = _DATASETS[name]
    directory = prepared.newest_version(name, data_dir) if entry.splits else None
    if directory is None:
        return entry.info
    train, test = (prepared.count(directory, split) for split in entry.splits)
    return dataclasses.replace(entry.info, train_examples=train, test_examples=test)


def splits(name: str) -> tuple[str, ...]:
    """Returns TFDS's names of the splits; empty if a package has the dataset."""
    return _DATASETS[name].splits


def load(name: str, data_dir: str, image_size: int, augmentation: str) -> Dataset:
    """Opens a dataset.

    Args:
      name: one of `DATASETS`.
      data_dir: directory of prepared datasets; TFDS's default directory if empty.
        Unused for a dataset that comes with a package.
      image_size: height and width of the images, in pixels.
      augmentation: one of `AUGMENTATIONS`.

    Raises:
      DataError: `data_dir` cannot be a path, or the dataset is missing, incomplete,
        damaged, or in a file format without random access.
    """
    entry = _DATASETS[name]
    train, test = entry.open(name, data_dir, entry.splits)
    return Dataset(
        train=train,
        test=test,
        train_image=augment.augmenter(augmentation, image_size),
        test_image=functools.partial(images.evaluation_view, size=image_size),
    )


def _open_digits(
    name: str, data_dir: str, splits: tuple[str, ...]
) -> tuple[DecodedExamples, DecodedExamples]:
    del name, data_dir, splits  # the images come with scikit-learn
    return digits.split()


def _open_decoded(
    name: str, data_dir: str, splits: tuple[str, ...]
) -> tuple[DecodedExamples, DecodedExamples]:
    directory = prepared.checked_directory(name, data_dir, splits)
    classes = _DATASETS[name].info.num_classes
    train, test = (_decoded(directory, split, classes) for split in splits)
    return train, test


@functools.cache
def _decoded(directory: Path, split: str, num_classes: int) -> DecodedExamples:
    source = prepared.EncodedExamples(directory, split, num_classes)
    return arrays.decode(source, _CIFAR_SHAPE)


def _open_encoded(
    name: str, data_dir: str, splits: tuple[str, ...]
) -> tuple[prepared.EncodedExamples, prepared.EncodedExamples]:
    directory = prepared.checked_directory(name, data_dir, splits)
    classes = _DATASETS[name].info.num_classes
    train, test = (
        prepared.EncodedExamples(directory, split, classes) for split in splits
    )
    return train, test


def _per_channel(*values: float) -> tuple[float, ...]:
    """Scales constants published for pixels in [0, 1] to pixels in [0, 255]."""
    return tuple(255 * value for value in values)


_CIFAR_SHAPE = (32, 32, 3)

_DATASETS = {
    "digits": _Entry(
        Info(
            num_classes=10,
            channels=1,
            train_examples=1437,
            test_examples=360,
            mean=(77.9,),
            std=(95.9,),
        ),
        splits=(),
        open=_open_digits,
    ),
    "cifar10": _Entry(
        Info(
            num_classes=10,
            channels=3,
            train_examples=50_000,
            test_examples=10_000,
            mean=_per_channel(0.4914, 0.4822, 0.4465),
            std=_per_channel(0.2470, 0.2435, 0.2616),
        ),
        splits=("train", "test"),
        open=_open_decoded,
    ),
    "cifar100": _Entry(
        Info(
            num_classes=100,
            channels=3,
            train_examples=50_000,
            test_examples=10_000,
            mean=_per_channel(0.5071, 0.4865, 0.4409),
            std=_per_channel(0.2673, 0.2564, 0.2762),
        ),
        splits=("train", "test"),
        open=_open_decoded,
    ),
    "imagenet2012": _Entry(
        Info(
            num_classes=1000,
            channels=3,
            train_examples=1_281_167,
            test_examples=50_000,
            mean=_per_channel(0.485, 0.456, 0.406),
            std=_per_channel(0.229, 0.224, 0.225),
        ),
        # The labels of the test images are not published.
        splits=("train", "validation"),
        open=_open_encoded,
    ),
}

DATASETS = tuple(_DATASETS)
