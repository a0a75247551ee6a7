"""How training images are changed at random.

Every function takes an example, a random generator and the side of the result, and
gives an image, uint8 of shape (size, size, channels).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from train.data import images

# Bounds for the part that `resized_crop` cuts out: its share of the image's area, and
# its width over its height or its height over its width.
_SMALLEST = 0.08
_LONGEST = 4 / 3
_ATTEMPTS = 10


def train_image(
    augmentation: str, size: int
) -> Callable[[Any, np.random.Generator], np.ndarray]:
    """The function that makes a training image of an example; it can be pickled."""
    return functools.partial(_AUGMENTATIONS[augmentation], size=size)


def none(raw: Any, rng: np.random.Generator, size: int) -> np.ndarray:
    """The image as it is evaluated on."""
    del rng
    return images.view(raw, size)


def shift(raw: Any, rng: np.random.Generator, size: int) -> np.ndarray:
    """Moves the image by up to an eighth of its side along each axis; black comes in.

    Those are the 4 pixels of 32 of He et al. (2016, section 4.2). An encoded image is
    moved as it is evaluated on; a decoded one at its own size, and resized after.
    """
    is_array = isinstance(raw["image"], np.ndarray)
    image = raw["image"] if is_array else images.view(raw, size)
    height, width, channels = image.shape
    down, across = height // 8, width // 8
    top, left = rng.integers(0, 2 * down + 1), rng.integers(0, 2 * across + 1)
    padded = np.zeros((height + 2 * down, width + 2 * across, channels), np.uint8)
    padded[down : down + height, across : across + width] = image
    return images.resized(padded[top : top + height, left : left + width], size)


def shift_flip(raw: Any, rng: np.random.Generator, size: int) -> np.ndarray:
    """Shifts the image, and mirrors every other one."""
    return _flip(shift(raw, rng, size), rng)


def resized_crop(raw: Any, rng: np.random.Generator, size: int) -> np.ndarray:
    """Resizes a part of random area, shape and place, and mirrors every other one.

    Szegedy et al. (2015, section 6): 8% to 100% of the area, and sides of a ratio
    between 3:4 and 4:3, here log-uniform so that wide is as likely as tall.
    """
    image = images.opened(raw["image"])
    box = random_box(image.width, image.height, rng)
    return _flip(images.crop(image, box, size), rng)


def random_box(width: int, height: int, rng: np.random.Generator) -> images.Box:
    """A part of an image of the given size, for `resized_crop`; of whole pixels.

    Where ten parts did not fit into the image, it is the largest in the middle.
    """
    for _ in range(_ATTEMPTS):
        area = rng.uniform(_SMALLEST, 1) * width * height
        aspect = _LONGEST ** rng.uniform(-1, 1)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = int(rng.integers(0, width - w + 1))
            top = int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    w = min(width, round(height * _LONGEST))
    h = min(height, round(width * _LONGEST))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return image[:, ::-1] if rng.integers(2) else image


_AUGMENTATIONS = {
    "none": none,
    "shift": shift,
    "shift_flip": shift_flip,
    "resized_crop": resized_crop,
}

AUGMENTATIONS = tuple(_AUGMENTATIONS)
