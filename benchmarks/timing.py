"""Times functions in turns, so that a change in the machine's speed meets all of them.

A shared machine is faster at one time than at another, and a time alone says little. In
every round each function runs once, in an order that is random and the same in every
run. A ratio is the median, over the rounds, of a function's time divided by the
baseline's time in the same round; its spread is the quartiles of these quotients.
"""

import argparse
import dataclasses
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from time import perf_counter
from typing import Any

import jax
import numpy as np

# What the figures are, for the commands to print beside them.
DEFINITION = (
    "A time is the median over the rounds; in a round everything runs once, in random "
    "order. A ratio is the median, over the rounds, of the time divided by the "
    "baseline's in the same round; in brackets, the quartiles of these quotients."
)


@dataclasses.dataclass(frozen=True)
class Spread:
    """The middle of some values.

    Attributes:
      median: half of them are no larger.
      low: a quarter of them are no larger; between two values, interpolated.
      high: three quarters of them are no larger, likewise.
    """

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclasses.dataclass(frozen=True)
class Summary:
    """A function's times.

    Attributes:
      median_s: the median over the rounds, in seconds.
      ratio: of a time to the baseline's in the same round.
    """

    median_s: float
    ratio: Spread


def orders(names: Iterable[str], rounds: int, seed: int = 0) -> Iterator[list[str]]:
    """The names in an order for each round, the same for the same seed."""
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
    """Runs functions in turns.

    Each runs once before the first round, untimed: a first run compiles and allocates.

    Args:
      functions: by name. A run is over when all arrays in the result are computed.
      rounds: how often each has its turn.
      seed: of the order.
      calls: how often a function is called in its turn. A GPU computes one while the
        next is called, as in training; with one call, what it takes to start a program
        and to hear of its end is in the time.

    Returns:
      By name, the seconds of a call in each round.
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
    del results  # after the clock has stopped, as they are freed here
    return (stop - start) / calls


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return Spread(float(median), float(low), float(high))


def ratio(seconds: Sequence[float], baseline: Sequence[float]) -> Spread:
    """Ratios of times to the baseline's in the same rounds."""
    return spread([a / b for a, b in zip(seconds, baseline, strict=True)])


def summarise(
    seconds: Mapping[str, Sequence[float]], baseline: str
) -> dict[str, Summary]:
    """Medians and quartiles of the times that `interleaved` returned.

    Args:
      seconds: by name, in each round.
      baseline: the name of what the others are compared with.
    """
    return {
        name: Summary(spread(each).median, ratio(each, seconds[baseline]))
        for name, each in seconds.items()
    }


def count(text: str) -> int:
    """A number of rounds or of calls on a command line.

    Raises:
      argparse.ArgumentTypeError: it is not one.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"takes a positive integer, got {text!r}")
    return int(text)
