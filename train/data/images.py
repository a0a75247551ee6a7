"""Parts of images, cut out and resized in one go, and decoded no finer than needed.

An image is either encoded (JPEG or PNG, of any size) or an array, uint8 of shape
(height, width, channels) with one or three channels. Results are such arrays.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from train.data.errors import DataError
from train.system.text import shown

# left, top, right, bottom in pixels, as Pillow has it.
Box = tuple[float, float, float, float]

# Of an encoded image, the share of the shorter side that is evaluated on: 224 pixels
# of 256, as Krizhevsky et al. (2012) did.
_CENTRE = 0.875

# A file of some kilobytes can ask for a gigabyte. The largest image of ImageNet has 61
# million pixels.
_MOST_PIXELS = 80_000_000
# Pillow opens many formats, some by other programs.
_FORMATS = ("JPEG", "PNG")

# Pillow warns, at first, of what is an error here.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
# ImageNet has photographs with such EXIF data, of which nothing is used here.
warnings.filterwarnings("ignore", "(Possibly c|C)orrupt EXIF data", UserWarning)


def opened(image: bytes | np.ndarray) -> Image.Image:
    """A Pillow image, of which an encoded image's pixels are not decoded yet.

    Raises:
      DataError: the bytes are not an image, or one too large.
    """
    if isinstance(image, np.ndarray):
        return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    with _damaged():
        found = Image.open(io.BytesIO(image), formats=_FORMATS)
    if found.width * found.height > _MOST_PIXELS:
        raise DataError(
            f"An image of {found.width} x {found.height} pixels has more than "
            f"{_MOST_PIXELS:,}, which is the limit."
        )
    return found


@contextlib.contextmanager
def _damaged() -> Iterator[None]:
    """Turns whatever Pillow raises into the error of an image that is damaged."""
    try:
        yield
    except UnidentifiedImageError as error:  # which names an object in memory
        raise DataError("Damaged image: neither JPEG nor PNG.") from error
    except Exception as error:  # of many types: broken PNGs are errors of syntax
        raise DataError(f"Damaged image: {shown(error)}") from error


def crop(image: Image.Image, box: Box, size: int) -> np.ndarray:
    """Cuts out a box and resizes it (bilinear) to `size` by `size`.

    A JPEG is decoded at the smallest of its scales 1/8, 1/4, 1/2 and 1 at which the box
    still has `size` pixels a side. Encoded images come out with three channels.

    Raises:
      DataError: the image is damaged.
    """
    scale = shrink(image, box, size)
    with _damaged():
        if image.format is not None:  # a file, and not an array
            image = image.convert("RGB")
        left, top, right, bottom = (edge / scale for edge in box)
        part = image.resize(
            (size, size), Image.Resampling.BILINEAR, (left, top, right, bottom)
        )
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


def decoded(image: bytes, shape: Sequence[int]) -> np.ndarray:
    """An encoded image at its own size, of shape (height, width, 3).

    Raises:
      DataError: the image is damaged, or has another shape.
    """
    found = opened(image)
    if (found.height, found.width, 3) != tuple(shape):  # before it is decoded
        raise DataError(
            f"An image is of {found.height} x {found.width} pixels, not {shape[0]} x "
            f"{shape[1]}: this is not the dataset that its directory is named after."
        )
    with _damaged():
        return np.asarray(found.convert("RGB"))


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
