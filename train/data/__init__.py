"""Datasets by name, and the batches that training and evaluation read."""

from train.data.augment import AUGMENTATIONS
from train.data.datasets import DATASETS, Dataset, Info, info, load
from train.data.errors import DataError
from train.data.pipeline import (
    Batch,
    check_workers_alive,
    evaluation_batches,
    first_batch,
    training_batches,
)

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "Batch",
    "DataError",
    "Dataset",
    "Info",
    "check_workers_alive",
    "evaluation_batches",
    "first_batch",
    "info",
    "load",
    "training_batches",
]
