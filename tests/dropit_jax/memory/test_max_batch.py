import functools
import itertools
import math
import tempfile
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized
from hypothesis import example, given
from hypothesis import strategies as st

from dropit_jax import memory
from dropit_jax.memory.compiled import batches, search


def _search(size, limit, upper):
    """The answer, and what was looked at."""
    looks = []

    def seen(number):
        looks.append(number)
        return size(number)

    return search.largest_within(seen, limit, upper), looks


# By how much each size exceeds the one before: plateaus, slopes and jumps.
_stretches = st.lists(
    st.tuples(st.integers(1, 300), st.sampled_from([0, 1, 7, 1000])), min_size=1
)


class SearchTest(parameterized.TestCase):
    @given(_stretches, st.integers(0, 10**4), st.integers(0, 10**5))
    @example([(300, 1)], 0, 150)
    @example([(5, 0)], 0, 0)
    def test_is_the_brute_force_answer(self, stretches, first, limit):
        rises = [rise for length, rise in stretches for _ in range(length)]
        sizes = list(itertools.accumulate(rises, initial=first))
        upper = len(sizes)
        answer, looks = _search(lambda number: sizes[number - 1], limit, upper)
        self.assertEqual(answer, sum(size <= limit for size in sizes))
        self.assertLen(set(looks), len(looks))
        self.assertLessEqual(len(looks), 6 * math.ceil(math.log2(upper)) + 2)
        self.assertBetween(min(looks), 1, upper)
        self.assertBetween(max(looks), 1, upper)
        if answer:
            self.assertContainsSubset({answer, min(answer + 1, upper)}, looks)

    @given(st.integers(0, 2**33), st.integers(1, 2**25), st.integers(2**34, 2**36))
    def test_few_looks_if_sizes_grow_evenly(self, parameters, sample, limit):
        upper = 2**40
        answer, looks = _search(lambda n: parameters + n * sample, limit, upper)
        self.assertEqual(answer, (limit - parameters) // sample)
        self.assertLessEqual(len(looks), 4)

    def test_the_next_does_not_fit_even_if_sizes_fall_at_times(self):
        def size(number):
            return 100 * number - 1500 * (number % 17 == 0)

        answer, _ = _search(size, 10**6, 2**20)
        self.assertLessEqual(size(answer), 10**6)
        self.assertGreater(size(answer + 1), 10**6)


_WIDTH = 512


def _mlp(batch):
    def step(ws, x):
        def loss(ws):
            return jnp.sum(jnp.tanh(jnp.tanh(x @ ws[0]) @ ws[1]))

        return jax.tree.map(jnp.subtract, ws, jax.grad(loss)(ws))

    ws = 2 * [jax.ShapeDtypeStruct((_WIDTH, _WIDTH), jnp.float32)]
    return step, (ws, jax.ShapeDtypeStruct((batch, _WIDTH), jnp.float32)), 0


_SAMPLE_BYTES = 10**6


def _fake_report(step, *args, target, donate):
    _, x = args
    return memory.CompileReport(
        target=target,
        temp_bytes=_SAMPLE_BYTES * x.shape[0],
        argument_bytes=10**6,
        output_bytes=10**6,
        aliased_bytes=10**6,
        flops=0.0,
        traffic_bytes=0,
        buffers=(),
    )


_faked = mock.patch.object(batches, "compile_report", _fake_report)


class MaxBatchTest(parameterized.TestCase):
    def test_the_answer_fits_and_the_next_batch_does_not(self):
        find = functools.partial(memory.max_batch, _mlp, "l4", multiple_of=64)
        plan, less = find(fraction=0.01), find(fraction=0.005)
        self.assertEqual(plan.available_bytes, int(memory.device_bytes("l4") * 0.01))
        self.assertEqual(plan.batch % 64, 0)
        self.assertLess(less.batch, plan.batch)
        peaks = []
        for batch in (plan.batch, plan.batch + 64):
            step, args, donate = _mlp(batch)
            report = memory.compile_report(step, *args, target="l4", donate=donate)
            results = report.output_bytes - report.aliased_bytes
            peaks.append(report.temp_bytes + report.argument_bytes + results)
        self.assertEqual(plan.report.peak_bytes, peaks[0])
        self.assertLessEqual(peaks[0], plan.available_bytes)
        self.assertGreater(peaks[1], plan.available_bytes)

    @_faked
    def test_what_may_be_used_is_three_quarters_at_first(self):
        plan = memory.max_batch(_mlp, "h100", multiple_of=3)
        available = memory.device_bytes("h100") * 3 // 4
        self.assertEqual(plan.available_bytes, available)
        self.assertEqual(plan.batch, (available - 10**6) // _SAMPLE_BYTES // 3 * 3)

    @_faked
    def test_no_more_than_asked_for(self):
        plan = memory.max_batch(_mlp, "h100", multiple_of=7, upper=50)
        self.assertEqual(plan.batch, 49)

    @_faked
    def test_nothing_fits(self):
        available = int(memory.device_bytes("h100") * 1e-4)
        with pytest.raises(
            memory.NoBatchFitsError,
            match=rf"of 8 takes 9,000,000 bytes.* {available:,}",
        ):
            memory.max_batch(_mlp, "h100", multiple_of=8, fraction=1e-4)

    @parameterized.parameters(
        ({"fraction": 0.0}, "fraction must lie in"),
        ({"fraction": 1.5}, "fraction must lie in"),
        ({"multiple_of": 0}, "multiple_of must lie in"),
        ({"multiple_of": 9, "upper": 8}, "multiple_of must lie in"),
    )
    def test_numbers_out_of_range(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            memory.max_batch(_mlp, "h100", **arguments)

    @parameterized.parameters((None, "name a target"), ("h1000", "Unknown target"))
    def test_a_target_is_needed(self, target, message):
        with pytest.raises(memory.TargetError, match=message):
            memory.max_batch(_mlp, target)

    def test_a_failure_tells_the_batch(self):
        failing = mock.Mock(side_effect=memory.CompilerError("failed"))
        with (
            mock.patch.object(batches, "compile_report", failing),
            pytest.raises(memory.CompilerError) as caught,
        ):
            memory.max_batch(_mlp, "h100", multiple_of=16)
        self.assertEqual(caught.value.__notes__, ["This was with a batch of 16."])


class DeviceBytesTest(parameterized.TestCase):
    @parameterized.parameters(("a100", 80), ("h100", 80), ("a6000", 48), ("l4", 24))
    def test_is_nearly_what_the_card_is_sold_with(self, target, gigabytes):
        self.assertBetween(
            memory.device_bytes(target), 0.9 * gigabytes * 2**30, gigabytes * 2**30
        )

    def test_a_description_that_does_not_tell(self):
        directory = self.enterContext(tempfile.TemporaryDirectory())
        path = Path(directory) / "mine.textproto"
        path.write_text("gpu_device_info {}")
        with pytest.raises(memory.TargetError, match="states no device_memory_size"):
            memory.device_bytes(path)


if __name__ == "__main__":
    absltest.main()
