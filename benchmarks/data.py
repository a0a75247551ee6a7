"""The throughput of the input pipeline on CIFAR-10, in images a second.

`python -m benchmarks.data [--data_dir=DIR] [--batches=50] [--rounds=5]`

CIFAR-10 has to be prepared (`python -m train.prepare cifar10`), in DIR or where TFDS
looks by default. In each round all variants take a turn, and the ratio of each to the
first is taken within the round; the medians over the rounds are printed.
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
# Augmentation, side of the images in pixels, and number of worker processes.
_VARIANTS: tuple[tuple[str, int, int], ...] = (
    ("none", 32, 0),
    ("shift_flip", 32, 0),
    ("shift_flip", 32, 1),
    ("shift_flip", 32, 2),
    ("resized_crop", 224, 0),
    ("resized_crop", 224, 2),
)


def measure(data_dir: str, batches: int, rounds: int) -> list[list[float]]:
    """Returns the images a second of each variant, in each round.

    Raises:
      DataError: the dataset is missing, or has too few images for a batch.
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
    """Returns the images a second over the next batches."""
    start, images = time.perf_counter(), 0
    for _ in range(batches):
        images += len(next(iterator)["label"])  # type: ignore[call-overload]
    return images / (time.perf_counter() - start)


def table(rates: Sequence[Sequence[float]]) -> str:
    """Returns a Markdown table of medians, and of medians of ratios to the first."""
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
    """Runs the command and prints the table."""
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
