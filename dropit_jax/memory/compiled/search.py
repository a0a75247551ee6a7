"""Searches a number with few looks at its costly size."""

import dataclasses
from collections.abc import Callable


def largest(size: Callable[[int], int], limit: int, upper: int) -> int:
    """The largest number of 1 ... `upper` whose size is within a limit; 0 if none is.

    Sizes should not fall from a number to a larger one. Both the answer and the number
    after it are looked at, unless the answer is `upper`. If sizes grow evenly, four or
    five looks are enough; six for each factor of two in `upper` are enough for any.

    Args:
      size: called once for each number that it is asked for.
      limit: the largest size that is within it.
      upper: the largest number that may be the answer.
    """
    first = size(1)
    if first > limit:
        return 0
    bracket = _Bracket(low=1, low_size=first, high=upper + 1)
    stalled = 0
    while bracket.high - bracket.low > 1:
        number = bracket.guess(limit, stalled)
        narrower = bracket.narrowed(number, size(number), limit)
        stalled = 0 if narrower.is_half_of(bracket) else stalled + 1
        bracket = narrower
    return bracket.low


@dataclasses.dataclass(frozen=True)
class _Bracket:
    """Two numbers that the answer lies between; it may be `low`.

    Attributes:
      low: a number within the limit.
      low_size: its size.
      high: a number beyond the limit, or the first that may not be the answer.
      high_size: its size; `None` of the latter.
      below: a number well below `low`, and its size.
    """

    low: int
    low_size: int
    high: int
    high_size: int | None = None
    below: tuple[int, int] = (0, 0)

    def guess(self, limit: int, stalled: int) -> int:
        """Where a straight line meets the limit, or after vain guesses the middle."""
        if stalled < 2:
            number = self._on_line(limit)
        elif self.high_size is None:
            number = 2 * self.low
        else:
            number = (self.low + self.high) // 2
        return max(self.low + 1, min(number, self.high - 1))

    def narrowed(self, number: int, size: int, limit: int) -> "_Bracket":
        """The bracket when the size of a number inside is known."""
        if size > limit:
            return dataclasses.replace(self, high=number, high_size=size)
        # A line through neighbours tells little.
        near = 4 * number < 5 * self.low
        below = self.below if near else (self.low, self.low_size)
        return dataclasses.replace(self, low=number, low_size=size, below=below)

    def is_half_of(self, wider: "_Bracket") -> bool:
        """Whether the look between them was worth it."""
        if self.high_size is None:
            return self.low >= 2 * wider.low
        if wider.high_size is None:
            return True
        return 2 * (self.high - self.low) <= wider.high - wider.low

    def _on_line(self, limit: int) -> int:
        number, size = self.below
        if self.high_size is not None:
            number, size = self.high, self.high_size
        rise, run = size - self.low_size, number - self.low
        if rise * run <= 0:
            return 2 * self.low
        return self.low + (limit - self.low_size) * run // rise
