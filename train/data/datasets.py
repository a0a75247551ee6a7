"""The datasets that a config can name.

A dataset is two random-access sources of examples, `{"image": uint8 (H, W, C), "label":
int}`, as `tfds.data_source` gives them and Grain reads them, and what is done to them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from train.data import digits


@dataclasses.dataclass(frozen=True)
class Info:
    """What is known of a dataset without reading it.

    Attributes:
      num_classes: labels are in [0, num_classes).
      channels: of an image.
      train_examples: how many examples there are to train on.
      test_examples: how many examples there are to evaluate on.
    """

    num_classes: int
    channels: int
    train_examples: int
    test_examples: int


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset that is ready to be read.

    Attributes:
      train: the examples to train on.
      test: the examples to evaluate on.
      augment: changes a training image at random; `(image, rng) -> image`.
      prepare: turns an image into the model's input, float32 of shape
        (image_size, image_size, channels), of about zero mean and unit variance.
    """

    train: Sequence[Any] | grain.sources.RandomAccessDataSource
    test: Sequence[Any] | grain.sources.RandomAccessDataSource
    augment: Callable[[np.ndarray, np.random.Generator], np.ndarray]
    prepare: Callable[[np.ndarray], np.ndarray]


def _digits(data_dir: str, image_size: int) -> Dataset:
    del data_dir  # the images come with scikit-learn
    train, test = digits.split()
    return Dataset(
        train=train,
        test=test,
        augment=digits.shift,
        prepare=lambda image: digits.prepare(image, image_size),
    )


_DATASETS: dict[str, tuple[Info, Callable[[str, int], Dataset]]] = {
    "digits": (
        Info(num_classes=10, channels=1, train_examples=1437, test_examples=360),
        _digits,
    ),
}

DATASETS = tuple(_DATASETS)


def info(name: str) -> Info:
    """What is known of a dataset without reading it."""
    return _DATASETS[name][0]


def load(name: str, data_dir: str, image_size: int) -> Dataset:
    """Opens a dataset.

    Args:
      name: one of `DATASETS`.
      data_dir: where prepared datasets are; unused for what ships with a package.
      image_size: the height and width that `Dataset.prepare` gives an image.
    """
    return _DATASETS[name][1](data_dir, image_size)
