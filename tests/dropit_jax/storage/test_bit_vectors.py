import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from dropit_jax.storage.selection import bit_vectors

# One word, and several; blocks of words, and blocks of these; filled up and not.
_SIZES = (1, 31, 32, 100, 2048, 5000, 200_000)


def _mask(size, rows=(3,), share=0.3):
    return np.random.default_rng(size).random((*rows, size)) < share


class BitVectorTest(parameterized.TestCase):
    @parameterized.product(size=_SIZES, rows=((), (3,), (2, 3)))
    def test_words_have_the_first_element_in_their_lowest_bit(self, size, rows):
        mask = _mask(size, rows)
        words = jax.jit(bit_vectors.to_words)(mask)
        chex.assert_shape(words, (*rows, bit_vectors.word_count(size)))
        packed = np.packbits(mask, axis=-1, bitorder="little")
        filled = np.zeros((*rows, 4 * words.shape[-1]), np.uint8)
        filled[..., : packed.shape[-1]] = packed
        chex.assert_trees_all_equal(words, filled.view("<u4").astype(np.uint32))
        chex.assert_trees_all_equal(bit_vectors.to_mask(words, size), mask)

    @parameterized.parameters(*_SIZES)
    def test_bytes_are_numpys(self, size):
        mask = _mask(size)
        words = bit_vectors.to_words(mask)
        packed = np.packbits(mask, axis=-1, bitorder="little")
        chex.assert_trees_all_equal(
            bit_vectors.to_bytes(words, packed.shape[-1]), packed
        )
        more = words.shape[-1] + 3
        unpacked = bit_vectors.from_bytes(jnp.asarray(packed), more)
        expected = np.zeros((3, more), np.uint32)
        expected[:, : words.shape[-1]] = words
        chex.assert_trees_all_equal(unpacked, expected)

    @parameterized.product(size=_SIZES, share=(0.0, 0.3, 1.0))
    def test_ranks_are_sums_of_what_is_before(self, size, share):
        mask = _mask(size, share=share)
        words = bit_vectors.to_words(mask)
        before = jax.jit(bit_vectors.count_before_words)(words)
        expected = np.cumsum(mask, axis=-1) - mask
        chex.assert_trees_all_equal(before, expected[:, ::32].astype(np.int32))
        rank = bit_vectors.count_before_bits(words, before).reshape(3, -1)[:, :size]
        chex.assert_trees_all_equal(rank, expected.astype(np.int32))

    def test_nth_bit(self):
        mask = _mask(32, rows=(200,))
        words = bit_vectors.to_words(mask)[:, 0]
        for row, word in zip(mask, words, strict=True):
            places = np.flatnonzero(row)
            found = bit_vectors.nth_bit(
                jnp.full(places.shape, word), jnp.arange(places.size)
            )
            chex.assert_trees_all_equal(found, places.astype(np.int32))

    @parameterized.parameters((64, 3, 192), (64, 3, 150), (40, 5, 200), (33, 4, 100))
    def test_words_of_chunks_are_those_of_rows(self, size, chunks, row_size):
        mask = _mask(row_size)
        filled = np.zeros((3, chunks * size), bool)
        filled[:, :row_size] = mask
        words = bit_vectors.to_words(filled.reshape(3, chunks, size))
        in_rows = bit_vectors.merge_chunks(words, size, row_size)
        chex.assert_trees_all_equal(bit_vectors.to_mask(in_rows, row_size), mask)


if __name__ == "__main__":
    absltest.main()
