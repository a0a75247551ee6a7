import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from dropit_jax.storage import packing


class PackTest(parameterized.TestCase):
    @parameterized.product(
        bits=(1, 2, 4, 8), shape=((0,), (1,), (7,), (8,), (3, 17), (2, 3, 16))
    )
    def test_round_trip(self, bits, shape):
        codes = np.random.default_rng(0).integers(0, 2**bits, shape).astype(np.uint8)
        packed = jax.jit(packing.pack, static_argnums=1)(codes, bits)
        chex.assert_type(packed, np.uint8)
        chex.assert_shape(packed, (*shape[:-1], math.ceil(shape[-1] * bits / 8)))
        self.assertEqual(packed.shape[-1], packing.packed_size(shape[-1], bits))
        chex.assert_trees_all_equal(packing.unpack(packed, bits, shape[-1]), codes)

    def test_single_bits_are_numpys(self):
        mask = np.random.default_rng(0).random((5, 37)) < 0.5
        expected = np.packbits(mask, axis=-1, bitorder="little")
        chex.assert_trees_all_equal(packing.pack(jnp.asarray(mask), 1), expected)

    def test_first_of_two_goes_into_the_low_half(self):
        packed = packing.pack(jnp.array([0x3, 0xA, 0x7], jnp.uint8), 4)
        self.assertEqual(packed.tolist(), [0xA3, 0x07])


if __name__ == "__main__":
    absltest.main()
