"""The handwritten digits that ship with scikit-learn: 1,797 images of 8x8 pixels.

They are the test set of the UCI data set "Optical Recognition of Handwritten Digits"
(Alpaydin and Kaynak, 1998).
"""

from typing import TypedDict

import numpy as np
import sklearn.datasets
import sklearn.model_selection
from PIL import Image

# Of all pixels of the training images, which `split` scales to [0, 255].
_MEAN, _STD = 77.9, 95.9

_TEST_EXAMPLES = 360
_SPLIT_SEED = 0


class Example(TypedDict):
    """A digit: an image, uint8 of shape (8, 8, 1), and its label in [0, 10)."""

    image: np.ndarray
    label: int


def split() -> tuple[list[Example], list[Example]]:
    """The training and the test images, each with all digits in equal shares."""
    digits = sklearn.datasets.load_digits()
    images = np.round(digits.images[..., None] * (255 / 16)).astype(np.uint8)
    parts = sklearn.model_selection.train_test_split(
        images,
        digits.target,
        test_size=_TEST_EXAMPLES,
        stratify=digits.target,
        random_state=_SPLIT_SEED,
    )
    train_images, test_images, train_labels, test_labels = parts
    return _examples(train_images, train_labels), _examples(test_images, test_labels)


def shift(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Moves the image by up to one pixel along each axis; black comes in."""
    height, width, _ = image.shape
    top, left = rng.integers(0, 3, size=2)
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    return padded[top : top + height, left : left + width]


def prepare(image: np.ndarray, size: int) -> np.ndarray:
    """Scales the image to `size` by `size` (bilinear) and normalises its pixels."""
    scaled = Image.fromarray(image[..., 0]).resize(
        (size, size), Image.Resampling.BILINEAR
    )
    return ((np.asarray(scaled, np.float32) - _MEAN) / _STD)[..., None]


def _examples(images: np.ndarray, labels: np.ndarray) -> list[Example]:
    return [
        Example(image=image, label=int(label))
        for image, label in zip(images, labels, strict=True)
    ]
