"""How much is dropped, and what a step stores."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import dropit_jax
from configs import digits_resnet18, digits_vit
from dropit_jax import DropIT, compress
from train.config import config as config_lib
from train.config.config import dropit_section
from train.engine import job as job_lib
from train.engine import step as step_lib
from train.reports import measurements


class DroppedTest(parameterized.TestCase):
    @parameterized.parameters(
        (0.0, 16, False), (0.3, 64, True), (0.99, 16, True), (0.99, 4, False)
    )
    def test_of_a_chunk_it_is_what_a_residual_lacks(self, rate, chunk_size, in_layers):
        config = digits_resnet18.get_config()
        config.dropit = dropit_section(rate=rate, chunk_size=chunk_size, fill="zero")
        if in_layers:
            config.memory, config.layers = "baseline", "dropit"
        x = jnp.asarray(np.random.default_rng(0).permutation(chunk_size) + 1.0)
        rebuilt = compress(x[None], DropIT(rate, chunk_size=chunk_size)).decompress()
        expected = float((rebuilt == 0).mean())
        self.assertAlmostEqual(measurements.dropped(config), expected)

    @parameterized.parameters({"chunk_size": None}, {"granularity": "channel"})
    def test_without_chunks_it_is_the_rate(self, **fields):
        config = digits_resnet18.get_config()
        config.dropit = dropit_section(rate=0.8, **fields)
        self.assertEqual(measurements.dropped(config), 0.8)

    @parameterized.parameters("baseline", "exact", "lean")
    def test_nothing_is_without_a_policy(self, memory):
        config = digits_vit.get_config()
        config.memory = memory
        self.assertEqual(measurements.dropped(config), 0)


class StoredTest(parameterized.TestCase):
    def _config(self, **fields):
        config = digits_vit.get_config()
        config.batch_size = 32
        config.update(fields)
        return config

    @parameterized.parameters("dropit", "lean")
    def test_of_a_preset_it_is_that_of_the_plan(self, memory):
        config, plain = self._config(memory=memory), self._config(memory="baseline")
        _, (state, batch) = step_lib.abstract(config)
        preset = config_lib.preset(config)
        key = jax.eval_shape(lambda: jax.random.key(0))
        planned = dropit_jax.plan(
            step_lib.loss(plain), preset, key="rng" if preset.needs_key else None
        )(state.params, state.batch_stats, batch, key)
        self.assertEqual(measurements.stored_bytes(config), planned.nbytes)
        self.assertEqual(measurements.stored_bytes(plain), planned.plain_bytes)
        self.assertLess(planned.nbytes, planned.plain_bytes)

    @parameterized.parameters("baseline", "lean")
    def test_of_accumulated_steps_it_is_that_of_a_part(self, memory):
        parts = self._config(memory=memory, accumulate_steps=4)
        part = self._config(memory=memory, batch_size=8)
        self.assertEqual(
            measurements.stored_bytes(parts), measurements.stored_bytes(part)
        )

    def test_a_mesh_of_more_devices_changes_nothing(self):
        config = self._config(layers="dropit", dropit={"fill": "mean"})
        expected = measurements.stored_bytes(config)
        config.mesh.fsdp = 2
        self.assertEqual(measurements.stored_bytes(config), expected)
        with mock.patch.object(jax, "device_count", return_value=2):
            job_lib.check(config)

    def test_of_layers_it_is_what_they_keep_of_their_inputs(self):
        plain = self._config(memory="baseline")
        layers = self._config(memory="baseline", layers="dropit")
        # Query, key and value read one array, and each keeps its own part of it; the
        # second layer of the MLP reads four times as much, and the head a row a sample.
        tokens, row = 32 * 16 * 32 * 4, 32 * 32 * 4
        whole = (1 + 1 + 1 + 4) * tokens + row
        # Of 16 values of 4 bytes, 2 of 2 bytes, and 4 bits for the place of each.
        kept = ((3 + 1 + 1 + 4) * tokens + row) * (2 * 2 + 1) // (16 * 4)
        saved = measurements.stored_bytes(plain) - measurements.stored_bytes(layers)
        self.assertEqual(saved, whole - kept)


if __name__ == "__main__":
    absltest.main()
