"""Random augmentation of training images.

Each augmentation takes an example, a random generator and the side of the result in
pixels, and returns an image, uint8 `(size, size, channels)`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from train.data import images

# Bounds of the box of `resized_crop`: its share of the image's area, and the ratio of
# its longer to its shorter side.
_SMALLEST_AREA = 0.08
_LARGEST_ASPECT = 4 / 3
_ATTEMPTS = 10


def augmenter(
    augmentation: str, size: int
) -> Callable[[Any, np.random.Generator], np.ndarray]:
    """Returns a picklable function `(example, generator) -> training image`.

    Args:
      augmentation: one of `AUGMENTATIONS`.
      size: height and width of the image, in pixels.
    """
    return functools.partial(_AUGMENTATIONS[augmentation], size=size)


def no_augmentation(raw: Any, rng: np.random.Generator, size: int) -> np.ndarray:
    """Returns `images.evaluation_view` of an example."""
    del rng
    return images.evaluation_view(raw, size)


def shift(raw: Any, rng: np.random.Generator, size: int) -> np.ndarray:
    """Returns an example's image, shifted at random; the uncovered border is black.

    The shift is up to 1/8 of the image's side along each axis.
    He et al. (2016, section 4.2) shift 32 pixels by up to 4: a 32x32 window is cut at
    random out of the image padded to 40x40. An encoded image is shifted after
    `images.evaluation_view`; a decoded image is shifted at its own size, then resized.
    """
    is_array = isinstance(raw["image"], np.ndarray)
    image = raw["image"] if is_array else images.evaluation_view(raw, size)
    height, width, channels = image.shape
    shift_y, shift_x = height // 8, width // 8
    top, left = rng.integers(0, 2 * shift_y + 1), rng.integers(0, 2 * shift_x + 1)
    padded = np.zeros((height + 2 * shift_y, width + 2 * shift_x, channels), np.uint8)
    padded[shift_y : shift_y + height, shift_x : shift_x + width] = image
    return images.resize(padded[top : top + height, left : left + width], size)


def shift_flip(raw: Any, rng: np.random.Generator, size: int) -> np.ndarray:
    """Returns the image of `shift`, mirrored with probability 1/2."""
    return _flip_half(shift(raw, rng, size), rng)


def resized_crop(raw: Any, rng: np.random.Generator, size: int) -> np.ndarray:
    """Cuts out a random box, resizes it, and mirrors it with probability 1/2.

    As Szegedy et al. (2015, section 6): 8% to 100% of the area, and an aspect ratio
    between 3:4 and 4:3. The ratio is log-uniform: wide is as likely as tall.
    """
    image = images.open_image(raw["image"])
    box = random_box(image.width, image.height, rng)
    return _flip_half(images.crop(image, box, size), rng)


def random_box(width: int, height: int, rng: np.random.Generator) -> images.Box:
    """Returns a random box for `resized_crop`; sizes and edges are in whole pixels.

    If ten random boxes exceed the image, returns the largest centred box with an aspect
    ratio between 3:4 and 4:3.
    """
    for _ in range(_ATTEMPTS):
        area = rng.uniform(_SMALLEST_AREA, 1) * width * height
        aspect = _LARGEST_ASPECT ** rng.uniform(-1, 1)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = int(rng.integers(0, width - w + 1))
            top = int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    w = min(width, round(height * _LARGEST_ASPECT))
    h = min(height, round(width * _LARGEST_ASPECT))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _flip_half(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return image[:, ::-1] if rng.integers(2) else image


_AUGMENTATIONS = {
    "none": no_augmentation,
    "shift": shift,
    "shift_flip": shift_flip,
    "resized_crop": resized_crop,
}

AUGMENTATIONS = tuple(_AUGMENTATIONS)
