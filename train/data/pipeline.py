"""Batches of a dataset: shuffled, augmented and endless, or in order and once.

Batches are global: each of several processes gets its own rows of every batch. The
content of a batch does not depend on the number of processes, workers or threads.
"""

import atexit
import contextlib
import dataclasses
import functools
import gc
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from multiprocessing import parent_process, resource_tracker
from signal import (
    SIG_BLOCK,
    SIG_IGN,
    SIG_SETMASK,
    SIGHUP,
    SIGINT,
    SIGTERM,
    Signals,
    pthread_sigmask,
    signal,
)
from typing import Any, Protocol, TypedDict

import grain
import numpy as np
from absl import flags

from train.data.arrays import DecodedExamples, Source
from train.data.datasets import Dataset
from train.data.errors import DataError, naming_example
from train.system.children import children, end_workers
from train.system.text import shorten

# Batches that each worker process makes ahead.
_AHEAD_OF_WORKER = 2
# Batches that each thread makes ahead.
_AHEAD_OF_THREAD = 2
# Threads pay: Pillow releases the interpreter lock while it decodes and resizes.
_DECODING_THREADS = min(os.cpu_count() or 1, 16)
# Workers hand over batches in shared memory. Python's resource tracker, a process that
# inherits this warning filter, removes leftover shared memory at the end: no warning.
_TRACKER = "ignore:resource_tracker:UserWarning"


class Batch(TypedDict):
    """A batch of NumPy or JAX arrays, or of `jax.ShapeDtypeStruct`s.

    Attributes:
      image: uint8 `(batch, height, width, channels)`.
      label: int32 `(batch,)`.
      mask: float32 `(batch,)`: 1 for an example, 0 for padding.
    """

    image: Any
    label: Any
    mask: Any


class Batches(Protocol):
    """An iterator over batches; close the iterator after use."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def close(self) -> None:
        """Ends the threads or worker processes that make the batches."""


def training_batches(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    *,
    start: int = 0,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Returns endless training batches, shuffled anew in every epoch.

    An epoch has `len(dataset.train) // batch_size` batches. The remaining examples are
    left out of the epoch; they differ from epoch to epoch. Batch n depends only on the
    dataset, the batch size, the seed and n.

    Args:
      dataset: the dataset to read.
      batch_size: examples in a global batch, over all processes.
      seed: decides the order of examples and the random augmentation.
      start: number of the first batch, to resume a run.
      workers: number of processes that make batches; 0: threads make them.
      process_index: index of this process.
      process_count: number of processes that share a batch. Process i gets the rows
        from `i * batch_size // process_count` on, `batch_size // process_count` of
        them.

    Returns:
      An iterator. Closing or deleting it ends the workers.

    Raises:
      DataError: the dataset cannot fill a batch, or the processes cannot share one; on
        iteration: an example is damaged, or a worker is lost.
    """
    rows = _rows_per_process(batch_size, process_count)
    steps = len(dataset.train) // batch_size
    if not steps:
        raise DataError(
            f"{len(dataset.train)} training examples do not fill a batch of "
            f"{batch_size}: take a smaller one."
        )
    # Past its end, a slice of a `MapDataset` continues into the next epochs of the
    # dataset that it slices, each with its own order and random state.
    parts = (
        grain.MapDataset.source(dataset.train)
        .seed(seed)
        .shuffle()
        .random_map(_TrainingExample(dataset.train_image))
        .batch(rows, drop_remainder=True)[: steps * process_count]
        .repeat()
    )
    mine = parts[process_index::process_count][start:]
    return _iterator(mine, _thread_count(dataset.train), workers)


def first_batch(dataset: Dataset, batch_size: int, seed: int) -> Batch:
    """Returns the first batch of `training_batches`, made without workers."""
    batches = training_batches(dataset, batch_size, seed)
    with contextlib.closing(batches):
        return next(batches)


def evaluation_batches(
    dataset: Dataset,
    batch_size: int,
    *,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Returns batches of every test example once, in order; zeros pad the last batch.

    Batch n has the examples `n * batch_size` to `(n + 1) * batch_size - 1`. Each
    process gets its rows of every batch, as in `training_batches`.

    Args:
      dataset: the dataset to read.
      batch_size: examples in a global batch, over all processes.
      workers: number of processes that make batches; 0: threads make them.
      process_index: index of this process.
      process_count: number of processes that share a batch.

    Returns:
      An iterator. Closing or deleting it ends the workers.

    Raises:
      DataError: the processes cannot share a batch; on iteration: an example is
        damaged, or a worker is lost.
    """
    rows = _rows_per_process(batch_size, process_count)
    # Holds no training examples: Grain copies the source to every worker.
    length = -(-len(dataset.test) // batch_size) * batch_size
    padded = _PaddedTest(dataset.test, dataset.test_image, length)
    parts = grain.MapDataset.source(padded).batch(rows)
    mine = parts[process_index::process_count]
    return _iterator(mine, _thread_count(dataset.test), workers)


def check_workers_alive() -> None:
    """Checks, during the wait for a batch, that no worker process has died.

    Grain checks this too, but not while it waits for a worker to start.

    Raises:
      DataError: a worker ended by a signal or with an exit status other than 0.
    """
    for child in children():
        with contextlib.suppress(ChildProcessError):  # already reaped
            # WNOWAIT leaves the child to be reaped by Grain.
            peek = os.WEXITED | os.WNOHANG | os.WNOWAIT
            ended = os.waitid(os.P_PID, child, peek)
            if ended is not None and ended.si_status:
                how = f"exit status {ended.si_status}"
                if ended.si_code in (os.CLD_KILLED, os.CLD_DUMPED):
                    how = Signals(ended.si_status).name
                end_workers()
                raise _lost_worker(f"process {child} ended by {how}")


def _lost_worker(cause: str) -> DataError:
    return DataError(
        f"A worker of config.workers was lost: {cause}. If by SIGKILL, memory may have "
        "run out: take fewer workers. The same command goes on from the last "
        "checkpoint."
    )


@dataclasses.dataclass(frozen=True)
class _TrainingExample:
    """Maps a training example to a row of a batch."""

    image: Callable[[Any, np.random.Generator], np.ndarray]

    def __call__(self, raw: Any, rng: np.random.Generator) -> Batch:
        with naming_example(raw):
            return _row(self.image(raw, rng), raw["label"], 1)


@dataclasses.dataclass(frozen=True)
class _PaddedTest(Source):
    """The rows of all test examples, followed by rows of zeros as padding.

    Attributes:
      examples: the test examples.
      image: maps an example to an image.
      length: number of rows, with padding.
    """

    examples: Source
    image: Callable[[Any], np.ndarray]
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> Batch:
        if index >= len(self.examples):
            return self._padding
        raw = self.examples[index]
        with naming_example(raw):
            return _row(self.image(raw), raw["label"], 1)

    @functools.cached_property
    def _padding(self) -> Batch:
        return _row(np.zeros_like(self[0]["image"]), 0, 0)


def _row(image: np.ndarray, label: int, mask: int) -> Batch:
    return Batch(image=image, label=np.int32(label), mask=np.float32(mask))


def _rows_per_process(batch_size: int, process_count: int) -> int:
    if batch_size % process_count:
        raise DataError(
            f"A batch of {batch_size} cannot be split evenly over {process_count} "
            f"processes: make it a multiple of {process_count}."
        )
    return batch_size // process_count


def _thread_count(source: Source) -> int:
    # Without decoding, threads only compete for the interpreter lock: one is faster.
    return 1 if isinstance(source, DecodedExamples) else _DECODING_THREADS


def _iterator(batches: Any, threads: int, workers: int) -> Batches:
    """Returns an iterator whose workers, or threads if `workers` is 0, read ahead."""
    if not workers:
        ahead = grain.ReadOptions(threads, _AHEAD_OF_THREAD * threads)
        return iter(batches.to_iter_dataset(ahead))
    if not flags.FLAGS.is_parsed():  # not started by a command of this package
        flags.FLAGS.mark_as_parsed()  # Grain reads its flags
    if _TRACKER not in sys.warnoptions:
        sys.warnoptions.append(_TRACKER)
    # If one of Grain's threads started the tracker, Python would unblock SIGINT and
    # SIGTERM there, and in the workers that the thread starts: start it here. The
    # tracker ignores these two signals by itself; SIGHUP must be blocked for it.
    blocked = pthread_sigmask(SIG_BLOCK, {SIGHUP})
    resource_tracker.ensure_running()
    pthread_sigmask(SIG_SETMASK, blocked)
    one_by_one = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    processes = grain.MultiprocessingOptions(workers, _AHEAD_OF_WORKER)
    dataset = batches.to_iter_dataset(one_by_one).mp_prefetch(processes, _start_worker)
    iterator = iter(dataset)
    _with_workers.add(iterator)
    return _WorkerBatches(iterator)


class _WorkerBatches(Iterator[Batch]):
    """An iterator over batches of workers; any error is raised as a `DataError`.

    An error that a worker did not raise as a `DataError` counts as its loss.
    """

    def __init__(self, batches: grain.DatasetIterator[Batch]) -> None:
        self._batches = batches

    def __next__(self) -> Batch:
        try:
            return next(self._batches)
        except (StopIteration, DataError):
            raise
        except Exception as error:  # Grain raises no type of its own
            raise _lost_worker(shorten(error)) from error

    def close(self) -> None:
        self._batches.close()


# Iterators that may have workers, to be closed at exit: Grain cannot end workers once
# the interpreter shuts down.
_with_workers: weakref.WeakSet[grain.DatasetIterator[Batch]] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for iterator in list(_with_workers):
        iterator.close()
    # Deletion closes an iterator again, which fails once modules are gone.
    gc.collect()


def _start_worker(index: int, count: int) -> None:
    """Sets up a worker: it ends with its parent, and uses no device."""
    del index, count
    os.environ["JAX_PLATFORMS"] = "cpu"
    # A signal to the process group is for the parent, which may finish a step first.
    for signum in (SIGINT, SIGTERM, SIGHUP):
        signal(signum, SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := parent_process():
        parent.join()
        os._exit(1)
