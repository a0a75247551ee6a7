"""Adds up the sums that steps return, without waiting for the device."""

import collections
import dataclasses
import math
import time
from typing import Any

import jax

from train.engine.step import Sums

# The most steps that the host may be ahead of the device. One keeps the device busy;
# without a limit the batches of all steps ahead would fill its memory.
_MAX_PENDING = 2

FIELDS = tuple(field.name for field in dataclasses.fields(Sums))


class NonFiniteLossError(FloatingPointError):
    """The loss of a step, or the state or test loss after it, is infinite or NaN.

    Attributes:
      step: the number of the step, counted from 1.
      loss: the sum of the losses of the batch; NaN if the state or the test loss is not
        finite.
    """

    def __init__(self, step: int, loss: float, what: str | None = None) -> None:
        """Makes the message, with the step and possible remedies.

        Args:
          step: the number of the step.
          loss: the loss.
          what: the beginning of the message; `None`: "The loss became {loss}".
        """
        super().__init__(
            f"{what or f'The loss became {loss}'} at step {step}. In another "
            "--workdir, try a lower "
            "config.optimizer.learning_rate, a longer config.schedule.warmup_epochs or "
            "config.optimizer.clip_norm=1."
        )
        self.step, self.loss = step, loss


class Meter:
    """The sums of loss, correct answers and examples since the last reset.

    The sums leave out steps that the device has not computed yet; `finish` waits
    for these. The host adds in float64 and in the order of the steps, so the result
    does not depend on the time at which it fetches the sums of a step.
    """

    def __init__(self, *, may_diverge: bool = False) -> None:
        """Starts at zero.

        Args:
          may_diverge: whether to add an infinite or NaN loss, and raise no error.
        """
        self._may_diverge = may_diverge
        self._pending: collections.deque[tuple[int, Sums]] = collections.deque()
        self.reset()

    def reset(self) -> None:
        """Sets all sums to zero; drops pending steps, restarts the clock."""
        self.restore(dict.fromkeys(FIELDS, 0.0))

    def add(self, step: int, sums: Sums) -> None:
        """Adds the sums of a step, later if the device has not computed them yet.

        Waits if the device is more than two steps behind.

        Raises:
          NonFiniteLossError: the loss of this step or an earlier one is not finite.
        """
        self._pending.append((step, sums))
        while len(self._pending) > _MAX_PENDING:
            self._fetch()
        while self._pending and _is_ready(self._pending[0][1].count):
            self._fetch()

    def finish(self) -> None:
        """Waits for all steps passed to `add`, and adds their sums.

        Raises:
          NonFiniteLossError: the loss of a step is not finite.
        """
        while self._pending:
            self._fetch()

    @property
    def count(self) -> float:
        """The number of examples so far."""
        return self._sums["count"]

    @property
    def loss(self) -> float:
        """The mean loss so far, in nats; NaN before the first example."""
        return self._mean("loss")

    @property
    def accuracy(self) -> float:
        """The fraction of examples classified correctly; NaN before the first one."""
        return self._mean("correct")

    @property
    def top5_accuracy(self) -> float:
        """The fraction of examples with their class among the five likeliest.

        NaN before the first example.
        """
        return self._mean("correct_top5")

    @property
    def seconds(self) -> float:
        """The seconds since the last reset or restoration."""
        return time.monotonic() - self._started

    @property
    def rate(self) -> float:
        """The examples per second since the last reset or restoration."""
        return (self.count - self._restored) / self.seconds

    def state(self) -> dict[str, float]:
        """Returns the sums of all steps passed to `add`, for `restore`; waits for them.

        Raises:
          NonFiniteLossError: the loss of a step is not finite.
        """
        self.finish()
        return dict(self._sums)

    def restore(self, state: dict[str, float]) -> None:
        """Sets the sums to those of `state`; drops pending steps, resets the clock."""
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
