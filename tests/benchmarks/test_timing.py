import argparse
from unittest import mock

import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

from benchmarks.printing import timing


class Clock:
    """A clock that only the functions made of it move."""

    def __init__(self):
        self.now = 100.0
        self.calls = []

    def function(self, name, durations):
        """A function of known durations, that of the untimed run first."""
        left = iter(durations)

        def run():
            self.calls.append(name)
            self.now += next(left)
            return {"result": jnp.zeros(2)}

        return run


def _interleaved(durations, rounds, **kwargs):
    clock = Clock()
    functions = {name: clock.function(name, each) for name, each in durations.items()}
    with mock.patch.object(timing, "perf_counter", side_effect=lambda: clock.now):
        return timing.interleaved(functions, rounds, **kwargs), clock.calls


class InterleavedTest(parameterized.TestCase):
    def test_seconds_are_those_of_each_round_without_the_first_run(self):
        seconds, _ = _interleaved({"a": (64, 1, 2, 4), "b": (64, 8, 16, 32)}, 3)
        self.assertEqual(seconds, {"a": [1, 2, 4], "b": [8, 16, 32]})

    def test_in_each_round_everything_runs_once_in_another_order(self):
        names, rounds = "abcde", 12
        durations = {name: [1] * (rounds + 1) for name in names}
        _, calls = _interleaved(durations, rounds)
        turns = [calls[i : i + 5] for i in range(0, len(calls), 5)]
        self.assertLen(turns, rounds + 1)
        for turn in turns:
            self.assertCountEqual(turn, names)
        self.assertGreater(len(set(map(tuple, turns))), rounds // 2)

    def test_a_turn_may_be_of_several_calls(self):
        durations = {"a": (64, 1, 2, 4, 8), "b": (64, 1, 1, 6, 6)}
        seconds, calls = _interleaved(durations, 2, calls=2)
        self.assertEqual(seconds, {"a": [1.5, 6], "b": [1, 6]})
        turns = [calls[i : i + 2] for i in range(2, len(calls), 2)]
        self.assertCountEqual(turns, [["a", "a"], ["b", "b"]] * 2)

    def test_the_order_is_that_of_the_seed(self):
        durations = {name: [1] * 9 for name in "abcde"}
        _, calls = _interleaved(durations, 8)
        _, same = _interleaved(durations, 8)
        _, other = _interleaved(durations, 8, seed=1)
        self.assertEqual(calls, same)
        self.assertNotEqual(calls, other)

    def test_a_run_ends_when_its_result_is_there(self):
        waited = []
        with mock.patch.object(timing.jax, "block_until_ready", waited.append):
            timing.interleaved({"a": lambda: "result"}, 2)
        self.assertEqual(waited, ["result", ["result"], ["result"]])


class SummaryTest(parameterized.TestCase):
    def test_ratios_are_of_the_same_round(self):
        # The machine is four times as slow from the third round on.
        seconds = {"plain": [1.0, 1.0, 4.0, 4.0, 4.0], "new": [1.0, 2.0, 12, 16, 20]}
        summaries = timing.summarise(seconds, "plain")
        self.assertEqual(summaries["new"].median_s, 12)
        # Of 1, 2, 3, 4, 5; the ratio of the medians is the same only by chance.
        self.assertEqual(summaries["new"].ratio, timing.Spread(3, 2, 4))
        self.assertEqual(summaries["plain"].ratio, timing.Spread(1, 1, 1))

    def test_the_median_of_ratios_is_not_the_ratio_of_medians(self):
        seconds = {"plain": [1.0, 2.0, 4.0], "new": [4.0, 2.0, 4.0]}
        summary = timing.summarise(seconds, "plain")["new"]
        self.assertEqual((summary.median_s, summary.ratio.median), (4, 1))

    def test_quartiles_lie_between_values(self):
        self.assertEqual(timing.spread([4, 1, 2, 3]), timing.Spread(2.5, 1.75, 3.25))
        self.assertEqual(timing.spread([7]), timing.Spread(7, 7, 7))
        self.assertEqual(str(timing.spread([1, 2, 3])), "2.000 [1.500, 2.500]")

    @parameterized.parameters("0", "-1", "1.5", "many", "")
    def test_counts_are_positive_integers(self, text):
        self.assertEqual(timing.count("12"), 12)
        with pytest.raises(argparse.ArgumentTypeError):
            timing.count(text)


if __name__ == "__main__":
    absltest.main()
