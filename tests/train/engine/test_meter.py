import math
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from train.engine import meter as meter_lib
from train.engine.meter import Meter, NonFiniteLossError
from train.engine.step import Sums


def _sums(loss, correct=3.0, top5=4.0, count=4.0):
    return Sums(
        loss=jnp.float32(loss),
        correct=jnp.float32(correct),
        correct_top5=jnp.float32(top5),
        count=jnp.float32(count),
    )


def _add(meter, losses, start=1):
    for step, loss in enumerate(losses, start):
        meter.add(step, _sums(loss))


def _losses(count):
    return np.random.default_rng(0).random(count).astype(np.float32)


class MeterTest(parameterized.TestCase):
    def test_means_are_those_of_the_sums(self):
        rng, meter = np.random.default_rng(0), Meter()
        counts = rng.integers(5, 9, 30)
        top5 = np.array([rng.integers(0, count + 1) for count in counts])
        correct = np.array([rng.integers(0, most + 1) for most in top5])
        losses = _losses(30)
        rows = zip(losses, correct, top5, counts, strict=True)
        for step, row in enumerate(rows, 1):
            meter.add(step, _sums(*row))
        meter.finish()
        self.assertEqual(meter.count, counts.sum())
        self.assertEqual(meter.accuracy, correct.sum() / counts.sum())
        self.assertEqual(meter.top5_accuracy, top5.sum() / counts.sum())
        # In float64, in the order of the steps: to the last bit.
        total = 0.0
        for loss in losses:
            total += float(loss)
        self.assertEqual(meter.loss, total / counts.sum())

    def test_small_losses_are_not_lost_beside_large_ones(self):
        meter = Meter()
        _add(meter, [2.0**30, *[1.0] * 64])
        meter.finish()
        self.assertEqual(meter.loss, (2**30 + 64) / (65 * 4))

    @parameterized.parameters(0, 1, 4, 9)
    def test_goes_on_from_a_state(self, done):
        losses, whole, first, second = _losses(9), Meter(), Meter(), Meter()
        _add(whole, losses)
        _add(first, losses[:done])
        second.restore(first.state())
        _add(second, losses[done:], start=done + 1)
        self.assertEqual(second.state(), whole.state())
        self.assertEqual(
            set(whole.state()), {"loss", "correct", "correct_top5", "count"}
        )

    def test_its_state_is_a_copy(self):
        meter = Meter()
        _add(meter, [1.0])
        before = meter.state()
        _add(meter, [1.0])
        self.assertEqual(before["loss"], 1.0)
        self.assertEqual(meter.state()["loss"], 2.0)

    def test_nothing_has_no_mean(self):
        meter = Meter()
        _add(meter, [1.0])
        meter.reset()
        self.assertEqual(meter.count, 0)
        for mean in (meter.loss, meter.accuracy, meter.top5_accuracy):
            self.assertTrue(math.isnan(mean))

    def test_what_is_pending_does_not_outlive_a_reset(self):
        with mock.patch.object(meter_lib, "_is_ready", return_value=False):
            meter = Meter()
            _add(meter, [1.0, 2.0])
            meter.reset()
            meter.finish()
        self.assertEqual(meter.count, 0)

    def test_two_steps_may_be_under_way(self):
        with mock.patch.object(meter_lib, "_is_ready", return_value=False):
            meter = Meter()
            counts = []
            for step in range(1, 6):
                meter.add(step, _sums(1.0))
                counts.append(meter.count / 4)
            self.assertEqual(counts, [0, 0, 1, 2, 3])
            meter.finish()
        self.assertEqual(meter.count / 4, 5)

    def test_what_the_device_has_is_fetched_at_once(self):
        with mock.patch.object(meter_lib, "_is_ready", return_value=True):
            meter = Meter()
            meter.add(1, _sums(1.0))
            self.assertEqual(meter.count, 4)

    def test_the_rate_is_that_since_the_start_or_a_restoration(self):
        clock = self.enterContext(mock.patch.object(meter_lib.time, "monotonic"))
        clock.return_value = 10.0
        meter = Meter()
        _add(meter, [1.0, 1.0])
        meter.finish()
        clock.return_value = 14.0
        self.assertEqual((meter.seconds, meter.rate), (4.0, 2.0))
        other = Meter()
        other.restore(meter.state())
        _add(other, [1.0])
        other.finish()
        clock.return_value = 15.0
        self.assertEqual((other.count, other.seconds, other.rate), (12, 1.0, 4.0))


class NonFiniteLossTest(parameterized.TestCase):
    @parameterized.parameters((math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf"))
    def test_is_an_error_that_names_its_step(self, loss, text):
        meter = Meter()
        with pytest.raises(NonFiniteLossError) as caught:  # noqa: PT012
            _add(meter, [1.0, 2.0, loss, 4.0, 5.0, 6.0], start=41)
            meter.finish()
        error = caught.value
        self.assertIsInstance(error, FloatingPointError)
        self.assertEqual(error.step, 43)
        np.testing.assert_equal(error.loss, loss)
        self.assertIn(f"became {text} at step 43.", str(error))
        for remedy in (
            "config.optimizer.learning_rate",
            "config.schedule.warmup_epochs",
            "config.optimizer.clip_norm=1",
        ):
            self.assertIn(remedy, str(error))

    def test_is_found_at_most_two_steps_late(self):
        with mock.patch.object(meter_lib, "_is_ready", return_value=False):
            meter = Meter()
            _add(meter, [1.0, math.nan, 3.0])
            with pytest.raises(NonFiniteLossError, match=r"at step 2\."):
                meter.add(4, _sums(1.0))

    @parameterized.parameters("finish", "state")
    def test_is_found_by_what_waits(self, name):
        with mock.patch.object(meter_lib, "_is_ready", return_value=False):
            meter = Meter()
            _add(meter, [math.nan])
            with pytest.raises(NonFiniteLossError, match=r"at step 1\."):
                getattr(meter, name)()

    @parameterized.parameters(math.nan, math.inf)
    def test_of_an_evaluation_it_is_a_result(self, loss):
        meter = Meter(may_diverge=True)
        _add(meter, [1.0, loss, 1.0])
        meter.finish()
        np.testing.assert_equal(meter.loss, loss)
        self.assertEqual(meter.count, 12)
        self.assertEqual((meter.accuracy, meter.top5_accuracy), (0.75, 1.0))


if __name__ == "__main__":
    absltest.main()
