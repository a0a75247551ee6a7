"""Finds the largest number within a limit of size, where computing a size is slow."""

import dataclasses
from collections.abc import Callable


def largest_within(size: Callable[[int], int], limit: int, upper: int) -> int:
    """Returns the largest number in 1 ... `upper` whose size is at most a limit.

    Returns 0 if the size of 1 exceeds the limit. Sizes should not decrease. `size` is
    evaluated for the returned number and, unless that is `upper`, for the next one.
    Four or five evaluations suffice if sizes grow linearly, and six for each factor of
    two in `upper` (and two more) in any case.

    Args:
      size: the size of a number; called at most once for each number.
      limit: the largest allowed size.
      upper: the largest number to consider.
    """
    first = size(1)
    if first > limit:
        return 0
    bracket = _Bracket(low=1, low_size=first, high=upper + 1)
    stalled = 0
    while bracket.high - bracket.low > 1:
        number = bracket.guess(limit, stalled)
        narrower = bracket.narrowed(number, size(number), limit)
        stalled = 0 if narrower.is_progress_from(bracket) else stalled + 1
        bracket = narrower
    return bracket.low


@dataclasses.dataclass(frozen=True)
class _Bracket:
    """The bounds of the answer: `low <= answer < high`.

    Attributes:
      low: a number whose size is within the limit.
      low_size: the size of `low`.
      high: a number whose size exceeds the limit, or `upper + 1`.
      high_size: the size of `high`; `None` for `upper + 1`.
      below: a number well below `low`, and its size.
    """

    low: int
    low_size: int
    high: int
    high_size: int | None = None
    below: tuple[int, int] = (0, 0)

    def guess(self, limit: int, stalled: int) -> int:
        """Returns the next number to evaluate.

        Interpolates linearly; after two guesses without progress, bisects or doubles.
        """
        if stalled < 2:
            number = self._interpolated(limit)
        elif self.high_size is None:
            number = 2 * self.low
        else:
            number = (self.low + self.high) // 2
        return max(self.low + 1, min(number, self.high - 1))

    def narrowed(self, number: int, size: int, limit: int) -> "_Bracket":
        """Returns the narrower bracket, given the size of a number in the bracket."""
        if size > limit:
            return dataclasses.replace(self, high=number, high_size=size)
        # The slope between near neighbours is unreliable.
        near = 4 * number < 5 * self.low
        below = self.below if near else (self.low, self.low_size)
        return dataclasses.replace(self, low=number, low_size=size, below=below)

    def is_progress_from(self, wider: "_Bracket") -> bool:
        """Returns whether the bracket halved, `low` doubled, or `high_size` is new."""
        if self.high_size is None:
            return self.low >= 2 * wider.low
        if wider.high_size is None:
            return True
        return 2 * (self.high - self.low) <= wider.high - wider.low

    def _interpolated(self, limit: int) -> int:
        """Returns where the line through two known sizes meets the limit.

        The sizes are those of `low` and `high`, or of `below` and `low` while that of
        `high` is unknown. Returns `2 * low` if the line does not rise.
        """
        number, size = self.below
        if self.high_size is not None:
            number, size = self.high, self.high_size
        rise, run = size - self.low_size, number - self.low
        if rise * run <= 0:
            return 2 * self.low
        return self.low + (limit - self.low_size) * run // rise
