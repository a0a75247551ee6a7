from unittest import mock

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.workloads import sharded
from tests.benchmarks import examples

_VARIANTS = ("flax", "dropit_16")


class DevicesTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        with mock.patch.object(sharded, "VARIANTS", _VARIANTS):
            cls.results = sharded.measure_devices(examples.mlp(2), (1, 2), 2)

    def test_dropit_adds_no_collective(self):
        alone, alone_dropit, two, two_dropit = self.results
        self.assertEqual((alone.collectives, alone_dropit.collectives), ({}, {}))
        self.assertGreater(two.collectives["all-reduce"], 0)
        self.assertEqual(two.collectives, two_dropit.collectives)

    def test_a_device_caches_the_same_however_many_there_are(self):
        alone, alone_dropit, two, two_dropit = self.results
        self.assertEqual(two.residual_bytes, alone.residual_bytes)
        self.assertEqual(two_dropit.residual_bytes, alone_dropit.residual_bytes)
        self.assertLess(alone_dropit.residual_bytes, alone.residual_bytes)

    def test_bytes_are_those_of_the_shards(self):
        mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
        everywhere, shared = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

        def function(w, x):
            # On a device 4 by 6 of the product, all of w's sine, and half of a flag;
            # the zeros depend on nothing.
            return x @ w, jnp.sin(w), x[:, 0] > 0, jnp.zeros((64, 64))

        w = jax.device_put(jnp.ones((3, 6)), everywhere)
        x = jax.device_put(jnp.ones((8, 3)), shared)
        counted = sharded.bytes_a_device(function, (w, x), (everywhere, shared))
        self.assertEqual(counted, 4 * 4 * 6 + 4 * 3 * 6 + 4)
        results = jax.jit(function)(w, x)[:3]
        shards = [result.addressable_shards[0].data.nbytes for result in results]
        self.assertEqual(counted, sum(shards))

    def test_collectives_are_counted_by_kind(self):
        text = """
          %a = f32[4] all-reduce(%x), to_apply=%sum
          %b = f32[4] all-reduce-start(%y), to_apply=%sum
          %c = f32[4] all-reduce-done(%b)
          %d = f32[8] all-gather(%a), dimensions={0}
          %e = f32[8] add(%d, %d), metadata={op_name="all-gather"}
        """
        found = sharded.collectives(text)
        self.assertEqual(found, {"all-gather": 1, "all-reduce": 2})


if __name__ == "__main__":
    absltest.main()
