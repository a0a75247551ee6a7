import functools

import jax
from absl.testing import absltest, parameterized

from benchmarks import bounds
from dropit_jax import DropIT, Residual, compress

_ROW = 2**14


@functools.cache
def _bounds():
    return bounds.bounds(2**24, 0.875)


def _nbytes(*trees):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(trees))


class BytesTest(parameterized.TestCase):
    @parameterized.parameters((16, 2), (1024, 1))
    def test_bytes_are_those_of_the_arrays(self, chunk_size, rows):
        x = jax.random.normal(jax.random.key(0), (rows, _ROW))
        drop = DropIT(0.875, chunk_size=chunk_size)
        residual = jax.jit(compress, static_argnums=1)(x, drop)
        dense = jax.jit(Residual.decompress)(residual)
        bound = bounds.bounds(rows * _ROW, 0.875, (chunk_size,))[0]
        self.assertEqual(bound.compress_bytes, _nbytes(x, residual))
        self.assertEqual(bound.decompress_bytes, _nbytes(residual, dense))

    @parameterized.product(chunk_size=bounds.CHUNK_SIZES, rate=(0.5, 0.875))
    def test_the_encoding_is_the_one_of_fewer_bytes(self, chunk_size, rate):
        kept = DropIT(rate).kept(chunk_size)
        bits = next(bits for bits in (4, 8, 16) if chunk_size <= 2**bits)
        expected = "bitmap" if chunk_size < kept * bits else "index"
        drop = DropIT(rate, chunk_size=chunk_size)
        self.assertEqual(bounds.encoding((1, _ROW), drop), expected)

    def test_bounds_are_bytes_over_bandwidth(self):
        every = _bounds()
        self.assertLen(every, 3 * 6)
        first = {b.target: b for b in every if b.chunk_size == 16}
        # 64 MiB, and of 16 elements two values of 4 bytes and two indices of 4 bits.
        moved = 2**26 + 2**20 * 9
        self.assertEqual(first["h100"].compress_bytes, moved)
        for target, bandwidth in (("h100", 3352e9), ("a100", 1555e9), ("a5000", 768e9)):
            self.assertAlmostEqual(first[target].compress_s, moved / bandwidth)
        for bound in every:
            self.assertEqual(bound.section, "bound, nobody measured a time")

    def test_the_table_has_a_row_for_each_chunk_size(self):
        table = bounds.markdown(_bounds())
        self.assertIn("bound, nobody measured a time", table)
        self.assertIn("| both on h100, µs |", table)
        self.assertLen(table.splitlines(), 4 + 6)


if __name__ == "__main__":
    absltest.main()
