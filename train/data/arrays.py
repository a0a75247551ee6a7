"""Datasets whose decoded images fit into memory."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Protocol, TypedDict

import numpy as np
from jaxtyping import Int, UInt8

from train.data import images
from train.data.errors import naming_example
from train.data.prepared import EncodedExamples

# Examples per read of the source.
_EXAMPLES_PER_READ = 1000


class Source(Protocol):
    """A random-access sequence of examples, as Grain reads it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Example(TypedDict):
    """A decoded image, uint8 `(height, width, channels)`, and its label."""

    image: np.ndarray
    label: int


@dataclasses.dataclass(frozen=True)
class DecodedExamples:
    """Decoded examples; the arrays given become read-only.

    Attributes:
      images: uint8 `(n, height, width, channels)`.
      labels: integers `(n,)`.
    """

    images: UInt8[np.ndarray, "n height width channels"]
    labels: Int[np.ndarray, " n"]

    def __post_init__(self) -> None:
        self.images.flags.writeable = self.labels.flags.writeable = False

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return Example(image=self.images[index], label=int(self.labels[index]))


def decode(source: EncodedExamples, shape: Sequence[int]) -> DecodedExamples:
    """Decodes all n examples into `(n, height, width, 3)` and `(n,)`, in one thread.

    Images of a dataset that fits into memory are so small that several threads, which
    hold the interpreter lock in turns, take longer than one.

    Args:
      source: examples with an encoded `"image"` and a `"label"`.
      shape: (height, width, 3) of every image.

    Raises:
      DataError: an image cannot be decoded, or has another shape.
    """
    pixels = np.empty((len(source), *shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    indices = range(len(source))
    parts = (indices[i : i + _EXAMPLES_PER_READ] for i in indices[::_EXAMPLES_PER_READ])
    examples = itertools.chain.from_iterable(map(source.many, parts))
    for i, raw in enumerate(examples):
        with naming_example(raw):
            pixels[i] = images.decode(raw["image"], shape)
        labels[i] = raw["label"]
    return DecodedExamples(pixels, labels)
