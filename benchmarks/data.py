"""How many images a second the input pipeline makes of CIFAR-10.

`python -m benchmarks.data [--data_dir=DIR] [--batches=50] [--rounds=5]`

CIFAR-10 has to be prepared (`python -m train.prepare cifar10`), in DIR or where TFDS
has it. The variants take turns in one run, and the ratio of each to the first is that
of the same turn: the median of all turns is printed.
"""

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Sequence

from train import data

_DATASET = "cifar10"
_BATCH, _SEED = 128, 0
# Augmentation, side of the images, and processes that make batches.
_VARIANTS: tuple[tuple[str, int, int], ...] = (
    ("none", 32, 0),
    ("shift_flip", 32, 0),
    ("shift_flip", 32, 1),
    ("shift_flip", 32, 2),
    ("resized_crop", 224, 0),
    ("resized_crop", 224, 2),
)


def measure(data_dir: str, batches: int, rounds: int) -> list[list[float]]:
    """Images a second of each variant, in each round.

    Raises:
      DataError: the dataset is not there, or has too few images for a batch.
    """
    with contextlib.ExitStack() as stack:
        iterators = []
        for augmentation, size, workers in _VARIANTS:
            dataset = data.load(_DATASET, data_dir, size, augmentation)
            batch = min(_BATCH, len(dataset.train))
            iterator = data.training_batches(dataset, batch, _SEED, workers=workers)
            iterators.append(stack.enter_context(contextlib.closing(iterator)))
            next(iterator)  # starts the workers
        turns = [[_rate(it, batches) for it in iterators] for _ in range(rounds)]
    return [list(rates) for rates in zip(*turns, strict=True)]


def _rate(iterator: object, batches: int) -> float:
    """Images a second over the next batches."""
    start, images = time.perf_counter(), 0
    for _ in range(batches):
        images += len(next(iterator)["label"])  # type: ignore[call-overload]
    return images / (time.perf_counter() - start)


def table(rates: Sequence[Sequence[float]]) -> str:
    """The medians, and the medians of the ratios to the first, in Markdown."""
    lines = [
        "| augmentation | image | workers | images/s | ratio |",
        "| --- | --- | --- | --- | --- |",
    ]
    for (augmentation, size, workers), row in zip(_VARIANTS, rates, strict=True):
        ratio = statistics.median(a / b for a, b in zip(row, rates[0], strict=True))
        lines.append(
            f"| {augmentation} | {size}² | {workers} | "
            f"{statistics.median(row):,.0f} | {ratio:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data_dir", default="", help="Where datasets are.")
    parser.add_argument("--batches", type=int, default=50, help="In a turn.")
    parser.add_argument("--rounds", type=int, default=5, help="Turns.")
    args = parser.parse_args()
    try:
        print(table(measure(args.data_dir, args.batches, args.rounds)))
    except data.DataError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
