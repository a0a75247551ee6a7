"""Parts of images, cut out and resized in one go, and decoded no finer than needed.

An image is either encoded (JPEG or PNG, of any size) or an array, uint8 of shape
(height, width, channels) with one or three channels. Results are such arrays.
"""

import io
import warnings
from typing import Any

import numpy as np
from PIL import Image

from train.data.errors import DataError

# left, top, right, bottom in pixels, as Pillow has it.
Box = tuple[float, float, float, float]

# Of an encoded image, the share of the shorter side that is evaluated on: 224 pixels
# of 256, as Krizhevsky et al. (2012) did.
_CENTRE = 0.875

# ImageNet has photographs with such EXIF data, of which nothing is used here.
warnings.filterwarnings("ignore", "(Possibly c|C)orrupt EXIF data", UserWarning)


def opened(image: bytes | np.ndarray) -> Image.Image:
    """A Pillow image, of which an encoded image's pixels are not decoded yet.

    Raises:
      DataError: the bytes are not an image.
    """
    if isinstance(image, np.ndarray):
        return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    try:
        return Image.open(io.BytesIO(image))
    except (OSError, SyntaxError) as error:  # broken PNGs are errors of syntax
        raise DataError(f"Damaged image: {error}") from error


def crop(image: Image.Image, box: Box, size: int) -> np.ndarray:
    """Cuts out a box and resizes it (bilinear) to `size` by `size`.

    A JPEG is decoded at the smallest of its scales 1/8, 1/4, 1/2 and 1 at which the box
    still has `size` pixels a side. Encoded images come out with three channels.

    Raises:
      DataError: the image is damaged.
    """
    scale = shrink(image, box, size)
    try:
        if image.format is not None:  # a file, and not an array
            image = image.convert("RGB")
        left, top, right, bottom = (edge / scale for edge in box)
        part = image.resize(
            (size, size), Image.Resampling.BILINEAR, (left, top, right, bottom)
        )
    except (OSError, SyntaxError) as error:
        raise DataError(f"Damaged image: {error}") from error
    pixels = np.asarray(part)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def shrink(image: Image.Image, box: Box, size: int) -> int:
    """Has an image decoded smaller, if a box in it keeps `size` pixels a side.

    Returns:
      By what the sides of the image, and with them the box, are divided.
    """
    left, top, right, bottom = box
    shorter = min(right - left, bottom - top)
    scale = max((k for k in (1, 2, 4, 8) if k * size <= shorter), default=1)
    # Pillow takes the largest scale at which the image is not below this size.
    width = image.width
    drafted = image.draft(None, (width // scale, image.height // scale))
    if drafted is None:  # not a JPEG
        return 1
    _, (_, _, drafted_width, _) = drafted
    return round(width / drafted_width)


def whole(image: Image.Image) -> Box:
    """The box that holds all of an image."""
    return 0, 0, image.width, image.height


def resized(image: np.ndarray, size: int) -> np.ndarray:
    """The whole image, at `size` by `size`."""
    if image.shape[:2] == (size, size):
        return image
    pillow = opened(image)
    return crop(pillow, whole(pillow), size)


def decoded(image: bytes) -> np.ndarray:
    """An encoded image at its own size, of shape (height, width, 3).

    Raises:
      DataError: the image is damaged.
    """
    try:
        return np.asarray(opened(image).convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise DataError(f"Damaged image: {error}") from error


def view(raw: Any, size: int) -> np.ndarray:
    """How an example is seen when nothing about it is random.

    Of an encoded image that is the middle, as if the shorter side were resized to
    `size / 0.875` and `size` by `size` pixels cut out; of an array, all.

    Args:
      raw: the example; its `"image"` is used.
      size: height and width of the result.

    Raises:
      DataError: the image is damaged.
    """
    if isinstance(raw["image"], np.ndarray):
        return resized(raw["image"], size)
    image = opened(raw["image"])
    side = _CENTRE * min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return crop(image, (left, top, left + side, top + side), size)
