"""Writes the tiny datasets of the tests: `python -m tests.data.write_tiny_datasets`.

They have the names, the features and the files of CIFAR-10, CIFAR-100 and ImageNet as
TFDS prepares them, and parts of scikit-learn's two sample photographs as images.
"""

import io
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import sklearn.datasets
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.image_classification.cifar import Cifar10, Cifar100

DIRECTORY = Path(__file__).parent / "tensorflow_datasets"
EXAMPLES = {"train": 48, "test": 16, "validation": 16}

Imagenet = tfds.builder_cls("imagenet2012")
Examples = Iterator[tuple[int, dict[str, Any]]]


def write(directory: Path) -> None:
    """Writes the three datasets into a directory where they are not yet."""
    for builder in (_TinyCifar10, _TinyCifar100, _TinyImagenet):
        builder(data_dir=directory).download_and_prepare(file_format="array_record")


def cifar10(split: str) -> Examples:
    """PNGs of 32x32 pixels, as TFDS has them; the n-th is of class `n % 10`."""
    for i in range(EXAMPLES[split]):
        image = _part(_seed(split, i), 32, 32)
        label = i % 10
        id_ = f"{split}_{i:05d}"
        yield i, {"id": id_, "image": _encoded(image, "PNG"), "label": label}


def cifar100(split: str) -> Examples:
    """JPEGs of 32x32 pixels; the n-th is of class `7 n % 100`."""
    for i in range(EXAMPLES[split]):
        image = _part(_seed(split, i) + 1000, 32, 32)
        yield (
            i,
            {
                "id": f"{split}_{i:05d}",
                "image": _encoded(image, "JPEG"),
                "label": 7 * i % 100,
                "coarse_label": 7 * i % 100 // 5,
            },
        )


def imagenet2012(split: str) -> Examples:
    """JPEGs of 120x90 to 200x150 pixels; the n-th is of class `20 n`.

    The first of a split is grey, the second CMYK, as some of ImageNet's are.
    """
    for i in range(EXAMPLES[split]):
        rng = np.random.default_rng(_seed(split, i) + 2000)
        width, height = int(rng.integers(120, 201)), int(rng.integers(90, 151))
        image = _part(_seed(split, i) + 2000, width, height)
        image = image.convert({0: "L", 1: "CMYK"}.get(i, "RGB"))
        yield (
            i,
            {
                "image": _encoded(image, "JPEG"),
                "label": 20 * i,
                "file_name": f"{split}_{i:05d}.JPEG",
            },
        )


class _Tiny:
    """What replaces the download of a builder of TFDS's."""

    examples: Callable[[str], Examples]
    splits = ("train", "test")
    url_infos: ClassVar[dict[str, Any]] = {}  # checksums of what is downloaded

    def _split_generators(self, dl_manager: Any) -> dict[str, Examples]:
        return {split: type(self).examples(split) for split in self.splits}


class _TinyCifar10(_Tiny, Cifar10, skip_registration=True):
    name = "cifar10"
    examples = staticmethod(cifar10)


class _TinyCifar100(_Tiny, Cifar100, skip_registration=True):
    name = "cifar100"
    examples = staticmethod(cifar100)


class _TinyImagenet(_Tiny, Imagenet, skip_registration=True):
    name = "imagenet2012"
    examples = staticmethod(imagenet2012)
    splits = ("train", "validation")


def _seed(split: str, i: int) -> int:
    return i if split == "train" else 500 + i


def _part(seed: int, width: int, height: int) -> Image.Image:
    """A part of one of the photographs, of the given size once it is resized."""
    rng = np.random.default_rng(seed)
    photographs = sklearn.datasets.load_sample_images().images
    photograph = Image.fromarray(photographs[rng.integers(2)])
    zoom = min(rng.uniform(1, 2), photograph.width / width, photograph.height / height)
    w, h = int(width * zoom), int(height * zoom)
    left = int(rng.integers(0, photograph.width - w + 1))
    top = int(rng.integers(0, photograph.height - h + 1))
    return photograph.resize(
        (width, height), Image.Resampling.BICUBIC, (left, top, left + w, top + h)
    )


def _encoded(image: Image.Image, encoding: str) -> bytes:
    file = io.BytesIO()
    image.save(file, encoding, **({"quality": 60} if encoding == "JPEG" else {}))
    return file.getvalue()


if __name__ == "__main__":
    shutil.rmtree(DIRECTORY, ignore_errors=True)
    write(DIRECTORY)
    sys.stdout.write(f"Written: {DIRECTORY}\n")
