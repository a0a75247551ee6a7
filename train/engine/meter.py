"""Running sums of what the steps return, without waiting for them."""

import collections
import dataclasses
import math
import time
from typing import Any

import jax

from train.engine.step import Sums

# The host may run so many steps ahead of the device. One keeps the device busy; without
# a limit the batches of all the steps ahead would pile up in its memory.
_MAX_PENDING = 2

FIELDS = tuple(field.name for field in dataclasses.fields(Sums))


class NonFiniteLossError(FloatingPointError):
    """A loss, or a state after a step, that is infinite or not a number.

    Attributes:
      step: the step of which it is the loss or the state, counted from 1.
      loss: its sum over the batch; NaN for a state.
    """

    def __init__(self, step: int, loss: float, what: str | None = None) -> None:
        """Says which step it is, and what may help.

        Args:
          step: the step.
          loss: its loss.
          what: what became of what; `None`: of the loss.
        """
        super().__init__(
            f"{what or f'The loss became {loss}'} at step {step}. In another "
            "--workdir, try a lower "
            "config.optimizer.learning_rate, a longer config.schedule.warmup_epochs or "
            "config.optimizer.clip_norm=1."
        )
        self.step, self.loss = step, loss


class Meter:
    """Sums of loss, correct answers and examples since the last reset.

    Sums are added on the host, in float64 and in the order of the steps, so they do not
    depend on when they are fetched.
    """

    def __init__(self, *, may_diverge: bool = False) -> None:
        """Starts at zero.

        Args:
          may_diverge: whether a loss that is not finite counts like any other, and is
            not an error.
        """
        self._may_diverge = may_diverge
        self._pending: collections.deque[tuple[int, Sums]] = collections.deque()
        self.reset()

    def reset(self) -> None:
        """Starts over."""
        self.restore(dict.fromkeys(FIELDS, 0.0))

    def add(self, step: int, sums: Sums) -> None:
        """Adds the sums of one step, once the device has them."""
        self._pending.append((step, sums))
        while len(self._pending) > _MAX_PENDING:
            self._fetch()
        while self._pending and _is_ready(self._pending[0][1].count):
            self._fetch()

    def finish(self) -> None:
        """Waits for all steps added."""
        while self._pending:
            self._fetch()

    @property
    def count(self) -> float:
        """Examples so far."""
        return self._sums["count"]

    @property
    def loss(self) -> float:
        """Mean loss so far, in nats; NaN before the first example."""
        return self._mean("loss")

    @property
    def accuracy(self) -> float:
        """Fraction so far classified correctly; NaN before the first example."""
        return self._mean("correct")

    @property
    def top5_accuracy(self) -> float:
        """Fraction so far whose class is among the five likeliest, likewise."""
        return self._mean("correct_top5")

    @property
    def seconds(self) -> float:
        """Since the last reset or restoration."""
        return time.monotonic() - self._started

    @property
    def rate(self) -> float:
        """Examples a second, since the last reset or restoration."""
        return (self.count - self._restored) / self.seconds

    def state(self) -> dict[str, float]:
        """The sums so far, of all steps added."""
        self.finish()
        return dict(self._sums)

    def restore(self, state: dict[str, float]) -> None:
        """Goes on from sums that `state` gave."""
        self._pending.clear()
        self._sums = {name: state[name] for name in FIELDS}
        self._restored = self.count
        self._started = time.monotonic()

    def _mean(self, name: str) -> float:
        return self._sums[name] / self.count if self.count else math.nan

    def _fetch(self) -> None:
        step, sums = self._pending.popleft()
        host = jax.device_get(sums)
        if not (self._may_diverge or math.isfinite(host.loss)):
            raise NonFiniteLossError(step, float(host.loss))
        for name in FIELDS:
            self._sums[name] += float(getattr(host, name))


def _is_ready(array: Any) -> bool:
    return array.is_ready()
