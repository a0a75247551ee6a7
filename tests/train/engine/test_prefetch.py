from unittest import mock

import pytest
from absl.testing import absltest, parameterized

from train.engine import prefetch
from train.engine.prefetch import Prefetch


class _Clock:
    """Stands still unless it is moved on."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class _Batches:
    """The numbers below a limit; each takes a time to make."""

    def __init__(self, limit, clock=None, seconds=0.0, fails_at=None):
        self.made, self.closed = 0, 0
        self._limit, self._fails_at = limit, fails_at
        self._clock, self._seconds = clock, seconds

    def __iter__(self):
        return self

    def __next__(self):
        if self.closed:
            raise AssertionError("It is read after it was closed.")
        if self.made == self._fails_at:
            raise ValueError("A batch cannot be made.")
        if self.made == self._limit:
            raise StopIteration
        if self._clock is not None:
            self._clock.now += self._seconds
        self.made += 1
        return self.made - 1

    def close(self):
        self.closed += 1


class PrefetchTest(parameterized.TestCase):
    @parameterized.parameters(0, 1, 2, 3, 10)
    def test_every_batch_is_placed_and_given_once_in_order(self, count):
        placed = []

        def place(batch):
            placed.append(batch)
            return f"placed {batch}"

        with Prefetch(_Batches(count), place) as batches:
            self.assertEqual(list(batches), [f"placed {n}" for n in range(count)])
            self.assertIsNone(next(batches, None))  # and it stays at the end
        self.assertEqual(placed, list(range(count)))

    def test_two_are_placed_whenever_one_is_taken(self):
        source, placed = _Batches(10), []
        with Prefetch(source, placed.append) as batches:
            self.assertEqual(source.made, 0)  # nothing before it is asked for
            for taken in range(1, 10):
                next(batches)
                # The one that is taken, and the one for the step after.
                self.assertLen(placed, taken + 1)
                self.assertEqual(source.made, taken + 1)
            next(batches)
            self.assertLen(placed, 10)

    def test_the_source_is_closed_at_the_end(self):
        source = _Batches(3)
        with Prefetch(source, lambda batch: batch) as batches:
            list(batches)
            self.assertEqual(source.closed, 0)
        self.assertEqual(source.closed, 1)

    def test_the_source_is_closed_before_the_end(self):
        source = _Batches(30)
        with Prefetch(source, lambda batch: batch) as batches:
            next(batches)
        self.assertEqual((source.made, source.closed), (2, 1))

    def test_the_source_is_closed_after_an_error_which_goes_on(self):
        source, error = _Batches(3), RuntimeError("a step fails")

        def train():
            with Prefetch(source, lambda batch: batch) as batches:
                next(batches)
                raise error

        with pytest.raises(RuntimeError) as caught:
            train()
        self.assertIs(caught.value, error)
        self.assertEqual(source.closed, 1)

    def test_an_error_of_the_source_goes_on(self):
        source = _Batches(3, fails_at=1)
        with (
            pytest.raises(ValueError, match="cannot be made"),
            Prefetch(source, lambda batch: batch) as batches,
        ):
            next(batches)
        self.assertEqual(source.closed, 1)

    def test_an_error_of_placing_goes_on(self):
        source = _Batches(3)

        def place(batch):
            raise MemoryError(batch)

        with pytest.raises(MemoryError), Prefetch(source, place) as batches:
            next(batches)
        self.assertEqual(source.closed, 1)

    def test_batches_are_let_go_at_the_end(self):
        batches = Prefetch(_Batches(3), lambda batch: batch)
        with batches:
            next(batches)
            self.assertLen(batches._placed, 1)
        self.assertEmpty(batches._placed)


class WaitedTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.clock = _Clock()
        self.enterContext(mock.patch.object(prefetch.time, "monotonic", self.clock))

    def test_is_the_time_in_which_batches_are_made(self):
        with Prefetch(_Batches(10, self.clock, 0.25), lambda batch: batch) as batches:
            next(batches)  # makes two
            self.assertEqual(batches.take_waited(), 0.5)
            for _ in range(3):
                next(batches)  # makes one
            self.assertEqual(batches.take_waited(), 0.75)

    def test_starts_anew_when_it_is_taken(self):
        with Prefetch(_Batches(10, self.clock, 0.25), lambda batch: batch) as batches:
            self.assertEqual(batches.take_waited(), 0)
            next(batches)
            batches.take_waited()
            self.assertEqual(batches.take_waited(), 0)

    def test_what_happens_between_does_not_count(self):
        with Prefetch(_Batches(10, self.clock, 0.25), lambda batch: batch) as batches:
            for _ in range(4):
                next(batches)
                self.clock.now += 100  # a step
            self.assertEqual(batches.take_waited(), 5 * 0.25)

    def test_at_the_end_there_is_nothing_to_wait_for(self):
        with Prefetch(_Batches(2, self.clock, 0.25), lambda batch: batch) as batches:
            next(batches)
            batches.take_waited()
            next(batches)
            self.assertIsNone(next(batches, None))
            self.assertEqual(batches.take_waited(), 0)


if __name__ == "__main__":
    absltest.main()
