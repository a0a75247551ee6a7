"""Batches of a dataset: shuffled, augmented and endless, or in order and once."""

from collections.abc import Iterator
from typing import Any, TypedDict

import grain
import numpy as np

from train.data.datasets import Dataset

_EVALUATION = grain.ReadOptions(num_threads=2, prefetch_buffer_size=64)
_TRAINING = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


class Batch(TypedDict):
    """A batch, of NumPy or JAX arrays, or of their shapes.

    Attributes:
      image: float32 of shape (batch, height, width, channels).
      label: int32 of shape (batch,).
      mask: float32 of shape (batch,): 1 for an example, 0 for padding.
    """

    image: Any
    label: Any
    mask: Any


def training_batches(
    dataset: Dataset, batch_size: int, seed: int
) -> grain.DatasetIterator[Batch]:
    """Endless batches, every epoch in an order of its own.

    An epoch has `len(dataset.train) // batch_size` batches: what does not fill a batch
    is left out, and is other examples in every epoch. The n-th batch depends on the
    seed and n alone, and `get_state` and `set_state` of the iterator move it.
    """

    def example(raw: Any, rng: np.random.Generator) -> dict[str, Any]:
        return _example(dataset, dataset.augment(raw["image"], rng), raw["label"])

    return iter(
        grain.MapDataset.source(dataset.train)
        .seed(seed)
        .shuffle()
        .random_map(example)
        .batch(batch_size, drop_remainder=True)
        .repeat()
        .to_iter_dataset(_TRAINING)
    )


def evaluation_batches(dataset: Dataset, batch_size: int) -> Iterator[Batch]:
    """Every test example once, in order; the last batch is padded."""

    def example(raw: Any) -> dict[str, Any]:
        return _example(dataset, raw["image"], raw["label"])

    batches = (
        grain.MapDataset.source(dataset.test)
        .map(example)
        .batch(batch_size)
        .to_iter_dataset(_EVALUATION)
    )
    return (_padded(batch, batch_size) for batch in batches)


def _example(dataset: Dataset, image: np.ndarray, label: int) -> dict[str, Any]:
    return {
        "image": dataset.prepare(image),
        "label": np.int32(label),
        "mask": np.float32(1),
    }


def _padded(batch: Batch, batch_size: int) -> Batch:
    missing = batch_size - len(batch["label"])
    if not missing:
        return batch

    def pad(array: np.ndarray) -> np.ndarray:
        return np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))

    return Batch(
        image=pad(batch["image"]), label=pad(batch["label"]), mask=pad(batch["mask"])
    )
