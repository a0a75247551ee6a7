import math

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from dropit_jax.storage import chunking
from tests.dropit_jax import reference

_SHAPES = st.lists(st.integers(1, 9), min_size=0, max_size=4).map(tuple)
_CHUNK_SIZES = st.one_of(st.none(), st.integers(1, 70))


class CutTest(parameterized.TestCase):
    @hypothesis.given(_SHAPES, _CHUNK_SIZES)
    @hypothesis.settings(max_examples=300)
    def test_chunks_are_those_of_the_definition(self, shape, chunk_size):
        chunks = chunking.chunking_of(shape, chunk_size)
        flat = np.arange(math.prod(shape)).reshape(*chunks.rows, chunks.row_size)
        actual = []
        for row in flat.reshape(-1, chunks.row_size):
            start = 0
            for count, size in chunks.segments:
                for _ in range(count):
                    actual.append(row[start : start + size].tolist())
                    start += size
            self.assertEqual(start, chunks.row_size)
        self.assertEqual(actual, reference.chunks(shape, chunk_size))

    @parameterized.parameters(
        ((4, 8, 8, 32), 16, (4, 8, 8)),
        ((4, 8, 8, 32), 32, (4, 8, 8)),
        ((4, 8, 8, 24), 16, (4,)),
        ((4, 8, 8, 32), 64, (4,)),
        ((4, 8, 8, 32), None, ()),
        ((32,), 16, ()),
    )
    def test_axes_are_merged_only_where_chunks_cross_them(self, shape, size, rows):
        self.assertEqual(chunking.chunking_of(shape, size).rows, rows)

    def test_join_undoes_split(self):
        chunks = chunking.chunking_of((3, 37), 16)
        x = jnp.arange(3 * 37).reshape(3, 37)
        segments = chunking.split(x, chunks.segments)
        self.assertEqual([s.shape for s in segments], [(3, 2, 16), (3, 1, 5)])
        np.testing.assert_array_equal(chunking.join(segments), x)


if __name__ == "__main__":
    absltest.main()
