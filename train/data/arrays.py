"""Datasets that are small enough to be kept decoded in memory."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Protocol, TypedDict

import numpy as np
from jaxtyping import Int, UInt8

from train.data import images
from train.data.errors import of_example
from train.data.prepared import Records

# Examples that are read at once.
_CHUNK = 1000


class Source(Protocol):
    """Examples by their number, as Grain reads them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Example(TypedDict):
    """A decoded image, uint8 of shape (height, width, channels), and its label."""

    image: np.ndarray
    label: int


@dataclasses.dataclass(frozen=True)
class Examples:
    """Examples in memory.

    Attributes:
      images: all images; never written to.
      labels: their labels.
    """

    images: UInt8[np.ndarray, "n height width channels"]
    labels: Int[np.ndarray, " n"]

    def __post_init__(self) -> None:
        self.images.flags.writeable = self.labels.flags.writeable = False

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return Example(image=self.images[index], label=int(self.labels[index]))


def decode(source: Records, shape: Sequence[int]) -> Examples:
    """Decodes a whole dataset, one image after the other.

    Images for which memory suffices are so small that threads, which take turns in the
    interpreter between them, need longer together than one of them alone.

    Args:
      source: examples with an encoded `"image"` and a `"label"`.
      shape: (height, width, 3) of every image.

    Raises:
      DataError: an image cannot be decoded, or has another shape.
    """
    pixels = np.empty((len(source), *shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    indices = range(len(source))
    chunks = (indices[i : i + _CHUNK] for i in indices[::_CHUNK])
    examples = itertools.chain.from_iterable(map(source.many, chunks))
    for i, raw in enumerate(examples):
        with of_example(raw):
            pixels[i] = images.decoded(raw["image"], shape)
        labels[i] = raw["label"]
    return Examples(pixels, labels)
