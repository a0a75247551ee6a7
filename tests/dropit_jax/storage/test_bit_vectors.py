import chex
import jax
import numpy as np
from absl.testing import absltest, parameterized

from dropit_jax.storage.selection import bit_vectors

# One word, and several; blocks of words, and blocks of these; filled up and not.
_SIZES = (1, 31, 32, 100, 2048, 5000, 200_000)


def _mask(size, rows=(3,), share=0.3):
    return np.random.default_rng(size).random((*rows, size)) < share


@jax.jit
def _there_and_back(mask):
    words = bit_vectors.to_words(mask)
    return words, bit_vectors.to_mask(words, mask.shape[-1])


@jax.jit
def _ranks(mask):
    words = bit_vectors.to_words(mask)
    before = bit_vectors.count_before_words(words)
    return before, bit_vectors.count_before_bits(words, before)


class BitVectorTest(parameterized.TestCase):
    @parameterized.parameters(
        *((size, (3,)) for size in _SIZES),
        *((size, rows) for size in (31, 100, 5000) for rows in ((), (2, 3))),
    )
    def test_words_have_the_first_element_in_their_lowest_bit(self, size, rows):
        mask = _mask(size, rows)
        words, again = _there_and_back(mask)
        chex.assert_shape(words, (*rows, bit_vectors.word_count(size)))
        packed = np.packbits(mask, axis=-1, bitorder="little")
        filled = np.zeros((*rows, 4 * words.shape[-1]), np.uint8)
        filled[..., : packed.shape[-1]] = packed
        chex.assert_trees_all_equal(words, filled.view("<u4").astype(np.uint32))
        chex.assert_trees_all_equal(again, mask)

    @parameterized.parameters(*_SIZES)
    def test_bytes_are_numpys(self, size):
        mask = _mask(size)
        packed = np.packbits(mask, axis=-1, bitorder="little")
        more = bit_vectors.word_count(size) + 3

        @jax.jit
        def run(mask, packed):
            words = bit_vectors.to_words(mask)
            found = bit_vectors.to_bytes(words, packed.shape[-1])
            return words, found, bit_vectors.from_bytes(packed, more)

        words, found, unpacked = run(mask, packed)
        chex.assert_trees_all_equal(found, packed)
        expected = np.zeros((3, more), np.uint32)
        expected[:, : words.shape[-1]] = words
        chex.assert_trees_all_equal(unpacked, expected)

    @parameterized.parameters(*_SIZES)
    def test_ranks_are_sums_of_what_is_before(self, size):
        for share in (0.0, 0.3, 1.0):
            mask = _mask(size, share=share)
            before, rank = _ranks(mask)
            expected = np.cumsum(mask, axis=-1) - mask
            chex.assert_trees_all_equal(before, expected[:, ::32].astype(np.int32))
            rank = rank.reshape(3, -1)[:, :size]
            chex.assert_trees_all_equal(rank, expected.astype(np.int32))

    def test_nth_bit(self):
        mask = _mask(32, rows=(200,))
        words = bit_vectors.to_words(mask)
        numbers = np.broadcast_to(np.arange(32, dtype=np.int32), (200, 32))
        found = jax.jit(bit_vectors.nth_bit)(np.repeat(words, 32, axis=1), numbers)
        for row, places in zip(mask, found, strict=True):
            expected = np.flatnonzero(row).astype(np.int32)
            chex.assert_trees_all_equal(places[: expected.size], expected)

    @parameterized.parameters((64, 3, 192), (64, 3, 150), (40, 5, 200), (33, 4, 100))
    def test_words_of_chunks_are_those_of_rows(self, size, chunks, row_size):
        mask = _mask(row_size)
        filled = np.zeros((3, chunks * size), bool)
        filled[:, :row_size] = mask

        @jax.jit
        def run(in_chunks):
            words = bit_vectors.to_words(in_chunks)
            in_rows = bit_vectors.merge_chunks(words, size, row_size)
            return bit_vectors.to_mask(in_rows, row_size)

        found = run(filled.reshape(3, chunks, size))
        chex.assert_trees_all_equal(found, mask)


if __name__ == "__main__":
    absltest.main()
