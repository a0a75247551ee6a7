"""How much is dropped, beside what is really kept."""

import math

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import digits_resnet18, digits_vit
from dropit_jax import DropIT, compress
from train.config.config import dropit_section
from train.reports import measurements


class KeptTest(parameterized.TestCase):
    @settings(max_examples=30)
    @given(
        shape=st.tuples(
            st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(2, 20)
        ),
        rate=st.sampled_from((0.0, 0.3, 0.8, 0.99)),
        chunk_size=st.sampled_from((4, 16, 64, None)),
        granularity=st.sampled_from(("element", "channel")),
    )
    def test_it_is_what_a_residual_rebuilds(self, shape, rate, chunk_size, granularity):
        policy = DropIT(rate, granularity=granularity, chunk_size=chunk_size)
        x = jnp.asarray(np.random.default_rng(0).permutation(math.prod(shape)) + 1.0)
        rebuilt = compress(x.reshape(shape), policy).decompress()
        self.assertEqual(
            measurements.kept_elements(shape, policy), int((rebuilt != 0).sum())
        )


class DroppedTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"rate": 0.5}, 0.5),
        ({"rate": 0.99, "chunk_size": 16}, 15 / 16),
        ({"rate": 0.0}, 0.0),
    )
    def test_where_chunks_are_whole_it_is_that_of_a_chunk(self, fields, expected):
        config = digits_resnet18.get_config()
        config.dropit = dropit_section(**fields)
        self.assertAlmostEqual(measurements.dropped(config), expected)

    def test_channels_of_a_narrow_model_are_rounded(self):
        config = digits_resnet18.get_config()
        config.image_size, config.model.width = 8, 4
        config.dropit = dropit_section(rate=0.8, granularity="channel")
        # Activations of a stage: the first reads one of the stage before, in the first
        # stage the stem's; a shortcut reads the same. Of the head: one.
        stages = ((8, 4), (4, 8), (2, 16), (1, 32))
        kept = every = 0
        for number, (side, width) in enumerate(stages):
            before = stages[max(0, number - 1)]
            for each_side, each_width in (before, *[(side, width)] * 3):
                share = max(1, math.floor(0.2 * each_width + 1e-6))
                kept += each_side**2 * share
                every += each_side**2 * each_width
        kept, every = kept + 6, every + 32
        self.assertAlmostEqual(measurements.dropped(config), 1 - kept / every)

    @parameterized.parameters(True, False)
    def test_of_blocks_in_a_loop_all_count(self, scan):
        config = digits_vit.get_config()
        config.model.scan = scan
        config.dropit = dropit_section(rate=0.99, chunk_size=32)
        self.assertAlmostEqual(measurements.dropped(config), 31 / 32)

    def test_nothing_is_of_plain_flax_or_without_a_rate(self):
        config = digits_vit.get_config()
        for memory in ("baseline", "lean"):
            config.memory = memory
            self.assertEqual(measurements.dropped(config), 0)

    def test_a_mean_drops_as_much(self):
        config = digits_resnet18.get_config()
        config.dropit = dropit_section(rate=0.75, fill="mean")
        self.assertAlmostEqual(measurements.dropped(config), 0.75)


class CachedTest(parameterized.TestCase):
    @parameterized.parameters("baseline", "lean")
    def test_under_drop_it_is_not_the_layers_that_decide(self, memory):
        config = digits_vit.get_config()
        config.memory = memory
        self.assertGreater(measurements.cached_bytes(config), 0)
        config.drop = "lean"
        self.assertIsNone(measurements.cached_bytes(config))


if __name__ == "__main__":
    absltest.main()
