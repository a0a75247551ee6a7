"""Times functions in turns, so that a change in the machine's speed affects them alike.

The speed of a shared machine varies, so that a time alone says little. In every round
each function runs once, in a random order that is the same in every run. A ratio is the
median, over the rounds, of a function's time divided by the baseline's time in the same
round; its spread is the quartiles of these quotients.
"""

import argparse
import dataclasses
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from time import perf_counter
from typing import Any

import jax
import numpy as np

# The definition of the numbers, which the commands print below them.
DEFINITION = (
    "A time is the median over the rounds; in a round everything runs once, in random "
    "order. A ratio is the median, over the rounds, of the time divided by the "
    "baseline's in the same round; in brackets, the quartiles of these quotients."
)


@dataclasses.dataclass(frozen=True)
class Spread:
    """The median and the quartiles of some values, interpolated where between two.

    Attributes:
      median: the median.
      low: the lower quartile.
      high: the upper quartile.
    """

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclasses.dataclass(frozen=True)
class Summary:
    """A summary of a function's times.

    Attributes:
      median_s: the median time over the rounds, in seconds.
      ratio: the time over the baseline's in the same round.
    """

    median_s: float
    ratio: Spread


def orders(names: Iterable[str], rounds: int, seed: int = 0) -> Iterator[list[str]]:
    """Yields the names in a random order for each round, the same for a seed."""
    generator, order = random.Random(seed), list(names)
    for _ in range(rounds):
        generator.shuffle(order)
        yield list(order)


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    rounds: int,
    seed: int = 0,
    calls: int = 1,
) -> dict[str, list[float]]:
    """Times functions in turns.

    Each runs once before the first round, untimed: a first run compiles and allocates.

    Args:
      functions: functions by name. A call ends when all arrays of the result are ready.
      rounds: the number of turns of each function.
      seed: the seed of the order.
      calls: the number of calls in a turn. With several, a GPU computes one while the
        next is launched, as in training; with one, its time includes the launch and the
        synchronisation.

    Returns:
      The seconds of a call in each round, by name.
    """
    for function in functions.values():
        jax.block_until_ready(function())
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for order in orders(functions, rounds, seed):
        for name in order:
            seconds[name].append(_seconds(functions[name], calls))
    return seconds


def _seconds(function: Callable[[], Any], calls: int) -> float:
    start = perf_counter()
    results = jax.block_until_ready([function() for _ in range(calls)])
    stop = perf_counter()
    del results  # freed after the clock has stopped
    return (stop - start) / calls


def spread(values: Sequence[float]) -> Spread:
    """Returns the median and the quartiles."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return Spread(float(median), float(low), float(high))


def ratio(seconds: Sequence[float], baseline: Sequence[float]) -> Spread:
    """Returns the ratios of times to the baseline's in the same rounds."""
    return spread([a / b for a, b in zip(seconds, baseline, strict=True)])


def summarise(
    seconds: Mapping[str, Sequence[float]], baseline: str
) -> dict[str, Summary]:
    """Returns medians and ratios of the times that `interleaved` returned, by name.

    Args:
      seconds: the seconds in each round, by name.
      baseline: the name that the ratios are to.
    """
    return {
        name: Summary(spread(each).median, ratio(each, seconds[baseline]))
        for name, each in seconds.items()
    }


def count(text: str) -> int:
    """Parses a positive integer on a command line.

    Raises:
      argparse.ArgumentTypeError: the text is not one.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"takes a positive integer, got {text!r}")
    return int(text)
