"""Running sums of what the steps return, without waiting for them."""

import collections
import math
import time
from typing import Any

import jax

from train.step import Sums

# The host may run so many steps ahead of the device. One keeps the device busy; without
# a limit the batches of all the steps ahead would pile up in its memory.
_MAX_PENDING = 2


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
        self.restore({"loss": 0.0, "correct": 0.0, "count": 0.0})

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
        return self._count

    @property
    def loss(self) -> float:
        """Mean cross-entropy so far, in nats; NaN before the first example."""
        return self._loss / self._count if self._count else math.nan

    @property
    def accuracy(self) -> float:
        """Fraction so far classified correctly; NaN before the first example."""
        return self._correct / self._count if self._count else math.nan

    @property
    def rate(self) -> float:
        """Examples a second, since the last reset or restoration."""
        return (self._count - self._restored) / (time.monotonic() - self._started)

    def state(self) -> dict[str, float]:
        """The sums so far, of all steps added."""
        self.finish()
        return {"loss": self._loss, "correct": self._correct, "count": self._count}

    def restore(self, state: dict[str, float]) -> None:
        """Goes on from sums that `state` gave."""
        self._pending.clear()
        self._loss, self._correct = state["loss"], state["correct"]
        self._count = self._restored = state["count"]
        self._started = time.monotonic()

    def _fetch(self) -> None:
        step, sums = self._pending.popleft()
        host = jax.device_get(sums)
        if not (self._may_diverge or math.isfinite(host.loss)):
            raise FloatingPointError(
                f"The loss became {host.loss} at step {step}. Try a lower "
                "config.optimizer.learning_rate or a longer config.schedule."
                "warmup_epochs."
            )
        self._loss += float(host.loss)
        self._correct += float(host.correct)
        self._count += float(host.count)


def _is_ready(array: Any) -> bool:
    return array.is_ready()
