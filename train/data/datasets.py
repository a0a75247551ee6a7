"""The datasets that a config can name.

A dataset is two random-access sources of examples, and what makes images of them.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from train.data import arrays, augment, digits, images, prepared
from train.data.arrays import Examples, Source


@dataclasses.dataclass(frozen=True)
class Info:
    """What is known of a dataset without reading its examples.

    Attributes:
      num_classes: labels are in [0, num_classes).
      channels: of an image.
      train_examples: how many examples there are to train on.
      test_examples: how many examples there are to evaluate on.
      mean: of the pixels, in [0, 255], of the training images, for each channel.
      std: their standard deviation, for each channel.
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
      train: the examples to train on; they have a `"label"`.
      test: the examples to evaluate on.
      train_image: makes an image of an example to train on, with random changes:
        uint8 of shape (image_size, image_size, channels).
      test_image: makes an image of an example to evaluate on, of the same shape.
    """

    train: Source
    test: Source
    train_image: Callable[[Any, np.random.Generator], np.ndarray]
    test_image: Callable[[Any], np.ndarray]


@dataclasses.dataclass(frozen=True)
class _Row:
    """What the table of datasets says of one.

    Attributes:
      info: with the published numbers of examples.
      splits: TFDS's names of the parts to train and to evaluate on; none for a dataset
        that comes with a package.
      open: gives these parts; `(name, data_dir, splits) -> (train, test)`.
    """

    info: Info
    splits: tuple[str, ...]
    open: Callable[[str, str, tuple[str, ...]], tuple[Source, Source]]


def info(name: str, data_dir: str = "") -> Info:
    """What is known of a dataset without reading its examples.

    The numbers of examples are those of the prepared dataset, or the published ones if
    it is not there.

    Args:
      name: one of `DATASETS`.
      data_dir: where prepared datasets are; TFDS's default directory if empty.

    Raises:
      DataError: the prepared dataset's description is damaged.
    """
    row = _DATASETS[name]
    directory = prepared.find(name, data_dir) if row.splits else None
    if directory is None:
        return row.info
    train, test = (prepared.count(directory, split) for split in row.splits)
    return dataclasses.replace(row.info, train_examples=train, test_examples=test)


def splits(name: str) -> tuple[str, ...]:
    """TFDS's names of the parts of a dataset; none if it comes with a package."""
    return _DATASETS[name].splits


def load(name: str, data_dir: str, image_size: int, augmentation: str) -> Dataset:
    """Opens a dataset.

    Args:
      name: one of `DATASETS`.
      data_dir: where prepared datasets are; TFDS's default directory if empty. Unused
        for what comes with a package.
      image_size: the height and width of images to train and to evaluate on.
      augmentation: one of `AUGMENTATIONS`.

    Raises:
      DataError: the dataset is not there, incomplete, damaged, or in a file format that
        cannot be read in any order.
    """
    row = _DATASETS[name]
    train, test = row.open(name, data_dir, row.splits)
    return Dataset(
        train=train,
        test=test,
        train_image=augment.train_image(augmentation, image_size),
        test_image=functools.partial(images.view, size=image_size),
    )


def _digits(
    name: str, data_dir: str, splits: tuple[str, ...]
) -> tuple[Examples, Examples]:
    del name, data_dir, splits  # the images come with scikit-learn
    return digits.split()


def _in_memory(
    name: str, data_dir: str, splits: tuple[str, ...]
) -> tuple[Examples, Examples]:
    directory = prepared.locate(name, data_dir, splits)
    classes = _DATASETS[name].info.num_classes
    train, test = (_decoded(directory, split, classes) for split in splits)
    return train, test


@functools.cache
def _decoded(directory: Path, split: str, num_classes: int) -> Examples:
    source = prepared.Records(directory, split, num_classes)
    return arrays.decode(source, _CIFAR_SHAPE)


def _streamed(
    name: str, data_dir: str, splits: tuple[str, ...]
) -> tuple[prepared.Records, prepared.Records]:
    directory = prepared.locate(name, data_dir, splits)
    classes = _DATASETS[name].info.num_classes
    train, test = (prepared.Records(directory, split, classes) for split in splits)
    return train, test


def _per_channel(*shares: float) -> tuple[float, ...]:
    """Constants published for pixels in [0, 1], for pixels in [0, 255]."""
    return tuple(255 * share for share in shares)


_CIFAR_SHAPE = (32, 32, 3)

_DATASETS = {
    "digits": _Row(
        Info(
            num_classes=10,
            channels=1,
            train_examples=1437,
            test_examples=360,
            mean=(77.9,),
            std=(95.9,),
        ),
        splits=(),
        open=_digits,
    ),
    "cifar10": _Row(
        Info(
            num_classes=10,
            channels=3,
            train_examples=50_000,
            test_examples=10_000,
            mean=_per_channel(0.4914, 0.4822, 0.4465),
            std=_per_channel(0.2470, 0.2435, 0.2616),
        ),
        splits=("train", "test"),
        open=_in_memory,
    ),
    "cifar100": _Row(
        Info(
            num_classes=100,
            channels=3,
            train_examples=50_000,
            test_examples=10_000,
            mean=_per_channel(0.5071, 0.4865, 0.4409),
            std=_per_channel(0.2673, 0.2564, 0.2762),
        ),
        splits=("train", "test"),
        open=_in_memory,
    ),
    "imagenet2012": _Row(
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
        open=_streamed,
    ),
}

DATASETS = tuple(_DATASETS)
