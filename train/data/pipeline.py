"""Batches of a dataset: shuffled, augmented and endless, or in order and once.

Batches are global. Each of several processes gets its own rows of every batch, and the
rows do not depend on how many processes, worker processes and threads read them.
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

from train.data.arrays import Examples, Source
from train.data.datasets import Dataset
from train.data.errors import DataError, of_example
from train.system.children import children, end_workers
from train.system.text import shown

# Batches that a worker process has made before they are asked for.
_AHEAD_OF_WORKER = 2
# Batches that a thread has made before they are asked for.
_AHEAD_OF_THREAD = 2
# Pillow lets go of the interpreter while it decodes and resizes.
_DECODING_THREADS = min(os.cpu_count() or 1, 16)
# Batches cross in shared memory. Python's resource tracker, a process that takes over
# these options, removes what is left of it at the end; it need not warn of it.
_TRACKER = "ignore:resource_tracker:UserWarning"


class Batch(TypedDict):
    """A batch, of NumPy or JAX arrays, or of their shapes.

    Attributes:
      image: uint8 of shape (batch, height, width, channels).
      label: int32 of shape (batch,).
      mask: float32 of shape (batch,): 1 for an example, 0 for padding.
    """

    image: Any
    label: Any
    mask: Any


class Batches(Protocol):
    """An iterator over batches that has to be closed."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def close(self) -> None:
        """Ends what makes the batches."""


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
    """Endless batches, every epoch in an order of its own.

    An epoch has `len(dataset.train) // batch_size` batches: what does not fill a batch
    is left out, and is other examples in every epoch. The n-th batch depends on the
    dataset, the batch size, the seed and n alone.

    Args:
      dataset: what to read.
      batch_size: examples in a batch of all processes together.
      seed: decides the order and the random changes of images.
      start: the number of the first batch; resuming is starting later.
      workers: processes that make batches; without any, threads do.
      process_index: which of the processes this is.
      process_count: how many processes share a batch; this one gets
        `batch_size // process_count` rows, which follow those of the process before.

    Returns:
      An iterator; its `close` ends the workers, as does its deletion.

    Raises:
      DataError: the dataset cannot fill a batch, or the processes cannot share one.
    """
    rows = _rows(batch_size, process_count)
    steps = len(dataset.train) // batch_size
    if not steps:
        raise DataError(
            f"{len(dataset.train)} training examples do not fill a batch of "
            f"{batch_size}: take a smaller one."
        )
    # A slice of a `MapDataset` goes on into the next epochs of what it is a slice of,
    # with their own order and random state.
    parts = (
        grain.MapDataset.source(dataset.train)
        .seed(seed)
        .shuffle()
        .random_map(_TrainingExample(dataset.train_image))
        .batch(rows, drop_remainder=True)[: steps * process_count]
        .repeat()
    )
    mine = parts[process_index::process_count][start:]
    return _iterator(mine, _threads(dataset.train), workers)


def first_batch(dataset: Dataset, batch_size: int, seed: int) -> Batch:
    """The first of `training_batches`, on its own."""
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
    """Every test example once, in order; the last batch is padded with zeros.

    Batch n has the examples `n * batch_size` to `(n + 1) * batch_size - 1`. All
    processes get the same number of batches.

    Args:
      dataset: what to read.
      batch_size: examples in a batch of all processes together.
      workers: processes that make batches; without any, threads do.
      process_index: which of the processes this is.
      process_count: how many processes share a batch.

    Returns:
      An iterator; its `close` ends the workers, as does its deletion.

    Raises:
      DataError: the processes cannot share a batch.
    """
    rows = _rows(batch_size, process_count)
    # Without the training examples, which would go to every worker as well.
    length = -(-len(dataset.test) // batch_size) * batch_size
    padded = _PaddedTest(dataset.test, dataset.test_image, length)
    parts = grain.MapDataset.source(padded).batch(rows)
    mine = parts[process_index::process_count]
    return _iterator(mine, _threads(dataset.test), workers)


def check_workers_alive() -> None:
    """Checks that no worker has been lost, where a batch does not come.

    Grain notices a loss as well, but not while a worker starts, for which it waits.

    Raises:
      DataError: the system, or somebody, ended one.
    """
    for child in children():
        with contextlib.suppress(ChildProcessError):  # it has been waited for
            # Left in the table of processes, so that Grain finds it there.
            only_look = os.WEXITED | os.WNOHANG | os.WNOWAIT
            ended = os.waitid(os.P_PID, child, only_look)
            if ended is not None and ended.si_status:
                how = f"exit status {ended.si_status}"
                if ended.si_code in (os.CLD_KILLED, os.CLD_DUMPED):
                    how = Signals(ended.si_status).name
                end_workers()
                raise _lost(f"process {child} ended by {how}")


def _lost(what: str) -> DataError:
    return DataError(
        f"A worker of config.workers was lost: {what}. If by SIGKILL, memory may have "
        "run out: take fewer workers. The same command goes on from the last "
        "checkpoint."
    )


@dataclasses.dataclass(frozen=True)
class _TrainingExample:
    """Makes a row of a batch of an example."""

    image: Callable[[Any, np.random.Generator], np.ndarray]

    def __call__(self, raw: Any, rng: np.random.Generator) -> Batch:
        with of_example(raw):
            return _row(self.image(raw, rng), raw["label"], 1)


@dataclasses.dataclass(frozen=True)
class _PaddedTest(Source):
    """The rows of all test examples, and after them rows of zeros.

    Attributes:
      examples: the examples.
      image: makes an image of one.
      length: of the rows together.
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
        with of_example(raw):
            return _row(self.image(raw), raw["label"], 1)

    @functools.cached_property
    def _padding(self) -> Batch:
        return _row(np.zeros_like(self[0]["image"]), 0, 0)


def _row(image: np.ndarray, label: int, mask: int) -> Batch:
    return Batch(image=image, label=np.int32(label), mask=np.float32(mask))


def _rows(batch_size: int, process_count: int) -> int:
    if batch_size % process_count:
        raise DataError(
            f"A batch of {batch_size} cannot be split evenly over {process_count} "
            f"processes: make it a multiple of {process_count}."
        )
    return batch_size // process_count


def _threads(source: Source) -> int:
    # Without decoding, threads would take turns and be slower together than one alone.
    return 1 if isinstance(source, Examples) else _DECODING_THREADS


def _iterator(batches: Any, threads: int, workers: int) -> Batches:
    """Reads batches ahead, in order, in so many threads or in worker processes."""
    if not workers:
        ahead = grain.ReadOptions(threads, _AHEAD_OF_THREAD * threads)
        return iter(batches.to_iter_dataset(ahead))
    if not flags.FLAGS.is_parsed():  # in another program than those of this package
        flags.FLAGS.mark_as_parsed()  # Grain reads its flags
    if _TRACKER not in sys.warnoptions:
        sys.warnoptions.append(_TRACKER)
    # A thread that starts it would let signals through again, and with it its workers.
    # The tracker leaves SIGHUP blocked, and heeds no other signal.
    blocked = pthread_sigmask(SIG_BLOCK, {SIGHUP})
    resource_tracker.ensure_running()
    pthread_sigmask(SIG_SETMASK, blocked)
    one_by_one = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    processes = grain.MultiprocessingOptions(workers, _AHEAD_OF_WORKER)
    dataset = batches.to_iter_dataset(one_by_one).mp_prefetch(processes, _start_worker)
    iterator = iter(dataset)
    _with_workers.add(iterator)
    return _Made(iterator)


class _Made(Iterator[Batch]):
    """An iterator whose batches workers make."""

    def __init__(self, batches: grain.DatasetIterator[Batch]) -> None:
        self._batches = batches

    def __next__(self) -> Batch:
        try:
            return next(self._batches)
        except (StopIteration, DataError):
            raise
        except Exception as error:  # of Grain's, of which it has no type
            raise _lost(shown(error)) from error

    def close(self) -> None:
        self._batches.close()


# Iterators that may have workers: while the interpreter is taken down, Grain can no
# longer end them.
_with_workers: weakref.WeakSet[grain.DatasetIterator[Batch]] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for iterator in list(_with_workers):
        iterator.close()
    gc.collect()  # closed twice, without harm as long as modules are there


def _start_worker(index: int, count: int) -> None:
    """Makes a process one that lives as long as its parent, and needs no device."""
    del index, count
    os.environ["JAX_PLATFORMS"] = "cpu"
    # A signal to the whole group is for the parent, which may want to finish a step.
    for signum in (SIGINT, SIGTERM, SIGHUP):
        signal(signum, SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := parent_process():
        parent.join()
        os._exit(1)
