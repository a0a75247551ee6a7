"""Cuts boxes out of images and resizes them in one step.

An image is encoded (JPEG or PNG, of any size) or an array, uint8
`(height, width, channels)` with one or three channels. Results are arrays. A JPEG is
decoded at the lowest resolution that the result needs.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from train.data.errors import DataError
from train.system.text import shorten

# Left, top, right and bottom edge in pixels, as in Pillow.
Box = tuple[float, float, float, float]

# Side of the evaluated square over the shorter side of an encoded image: 224 of 256
# pixels, as Krizhevsky et al. (2012).
_CENTRE = 0.875

# A file of some kilobytes can decode to a gigabyte. The largest image of ImageNet has
# 61 million pixels.
_MOST_PIXELS = 80_000_000
# Pillow opens many more formats, some by starting another program.
_FORMATS = ("JPEG", "PNG")

# Pillow only warns of an image above its first limit; `open_image` raises an error.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
# Some photographs of ImageNet have corrupt EXIF data, which is not used here.
warnings.filterwarnings("ignore", "(Possibly c|C)orrupt EXIF data", UserWarning)


def open_image(image: bytes | np.ndarray) -> Image.Image:
    """Returns a Pillow image; the pixels of an encoded image are not decoded yet.

    Raises:
      DataError: the bytes are not an image, or the image is too large.
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
    """Turns any error of Pillow into a `DataError` of a damaged image."""
    try:
        yield
    except UnidentifiedImageError as error:  # its text is an object's address
        raise DataError("Damaged image: neither JPEG nor PNG.") from error
    except Exception as error:  # of many types: a broken PNG raises SyntaxError
        raise DataError(f"Damaged image: {shorten(error)}") from error


def crop(image: Image.Image, box: Box, size: int) -> np.ndarray:
    """Cuts out a box and resizes it (bilinear) to `(size, size, channels)`.

    A JPEG is decoded at the smallest of the scales 1/8, 1/4, 1/2 and 1 at which the box
    still has `size` pixels a side, or at 1 if the box is smaller than `size`. `image`
    is then of this scale: open an image anew for a second box. The result of an encoded
    image has three channels.

    Raises:
      DataError: the image is damaged.
    """
    divisor = set_decoding_divisor(image, box, size)
    with _damaged():
        if image.format is not None:  # a file, and not an array
            image = image.convert("RGB")
        left, top, right, bottom = (edge / divisor for edge in box)
        part = image.resize(
            (size, size), Image.Resampling.BILINEAR, (left, top, right, bottom)
        )
    pixels = np.asarray(part)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def set_decoding_divisor(image: Image.Image, box: Box, size: int) -> int:
    """Sets the divisor at which a JPEG will be decoded.

    Changes `image.size` accordingly. The box, which is to be resized to `size` pixels a
    side, keeps at least as many, unless it is smaller from the start. So for a box of
    1000 x 800 pixels and a size of 224, an image of 2000 x 1000 is decoded at
    1000 x 500.

    Returns:
      The divisor of the sides of the image and of the box: 2 in the example. It is 1
      for an image that is not a JPEG.
    """
    left, top, right, bottom = box
    shorter = min(right - left, bottom - top)
    divisor = max((k for k in (1, 2, 4, 8) if k * size <= shorter), default=1)
    # Pillow takes the largest divisor at which the image is not below this size.
    width = image.width
    drafted = image.draft(None, (width // divisor, image.height // divisor))
    if drafted is None:  # not a JPEG
        return 1
    _, (_, _, drafted_width, _) = drafted
    return round(width / drafted_width)


def full_box(image: Image.Image) -> Box:
    """Returns the box of the whole image."""
    return 0, 0, image.width, image.height


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes an image, `(height, width, channels) -> (size, size, channels)`.

    An image that has this size is returned itself, not copied.
    """
    if image.shape[:2] == (size, size):
        return image
    pillow = open_image(image)
    return crop(pillow, full_box(pillow), size)


def decode(image: bytes, shape: Sequence[int]) -> np.ndarray:
    """Decodes an image at its own size, to uint8 `(height, width, 3)`.

    Raises:
      DataError: the image is damaged, or has another shape.
    """
    found = open_image(image)
    if (found.height, found.width, 3) != tuple(shape):  # before it is decoded
        raise DataError(
            f"An image is of {found.height} x {found.width} pixels, not {shape[0]} x "
            f"{shape[1]}: this is not the dataset that its directory is named after."
        )
    with _damaged():
        return np.asarray(found.convert("RGB"))


def evaluation_view(raw: Any, size: int) -> np.ndarray:
    """Returns the image of an example without random augmentation, as for evaluation.

    An array is resized whole. Of an encoded image the central square is taken, as if
    the shorter side were resized to `size / 0.875` pixels and the central
    `size` by `size` pixels cut out.

    Args:
      raw: the example; only its `"image"` is read.
      size: height and width of the result, in pixels.

    Raises:
      DataError: the image is damaged.
    """
    if isinstance(raw["image"], np.ndarray):
        return resize(raw["image"], size)
    image = open_image(raw["image"])
    side = _CENTRE * min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return crop(image, (left, top, left + side, top + side), size)
