import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax import lax

from dropit_jax.storage.selection import elements
from tests.dropit_jax import reference

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
# (chunk size, kept): one pass, several, ranks, all but one, all; both sides of
# MAX_SMALL; columns that are filled up.
_SIZES = (
    (1, 1),
    (2, 1),
    (7, 3),
    (16, 1),
    (16, 2),
    (16, 4),
    (16, 5),
    (16, 8),
    (16, 16),
    (33, 4),
    (64, 8),
    (64, 63),
    (65, 8),
    (300, 77),
    (5000, 600),
)
# Every size in 32 bits, and one of each way in the types of 16.
_CASES = (
    *((size, jnp.float32) for size in _SIZES),
    ((16, 2), jnp.bfloat16),
    ((16, 2), jnp.float16),
    ((16, 8), jnp.bfloat16),
    ((64, 63), jnp.float16),
    ((300, 77), jnp.bfloat16),
    ((300, 77), jnp.float16),
)
_METHOD_CASES = (
    *((*case, "auto") for case in _CASES),
    ((16, 2), jnp.float32, "top_k"),
    ((16, 2), jnp.float16, "top_k"),
    ((300, 77), jnp.float32, "top_k"),
    ((300, 77), jnp.bfloat16, "top_k"),
)


def _in_order(indices, size, method):
    """Indices as `method` gives them: by itself it sorts none of large chunks."""
    large = size > elements.MAX_SMALL and method == "auto"
    return np.sort(indices, axis=-1) if large else np.asarray(indices)


_top_k = functools.partial(jax.jit, static_argnums=(1, 2))(elements.top_k)


@functools.cache
def _all(size, k, dtype, method):
    """An array, and by name what every function makes of it, compiled in one."""

    @jax.jit
    def run(x):
        values, indices = elements.top_k(x, k, method)
        mask = elements.top_k_mask(x, k, method)
        compact = elements.compact(x, mask, k)
        return {
            "values": values,
            "indices": indices,
            "mask": mask,
            "placed": elements.place(values, indices, size),
            "compact": compact,
            "expanded": elements.expand(compact, mask),
        }

    x = reference.activation(0, (15, size), dtype)
    return x, jax.device_get(run(x))


class TopKTest(parameterized.TestCase):
    @parameterized.parameters(*_METHOD_CASES)
    def test_is_the_twins(self, size, dtype, method):
        x, found = _all(*size, dtype, method)
        expected = np.asarray([reference.top_k(row, size[1]) for row in x])
        expected = _in_order(expected, size[0], method)
        chex.assert_trees_all_equal(found["indices"], expected)
        kept = np.take_along_axis(x, expected, axis=-1)
        reference.assert_same_bits(found["values"], kept)

    @parameterized.parameters(
        ((16, 2), jnp.float32), ((64, 8), jnp.float32), ((300, 77), jnp.bfloat16)
    )
    def test_is_lax_top_k_of_the_magnitudes(self, size, dtype):
        x, found = _all(*size, dtype, "auto")
        expected = lax.top_k(jnp.abs(x), size[1])[1]
        expected = _in_order(expected, size[0], "auto")
        chex.assert_trees_all_equal(found["indices"], expected)

    @parameterized.parameters(*_METHOD_CASES)
    def test_mask_is_where_top_k_is(self, size, dtype, method):
        x, found = _all(*size, dtype, method)
        for row, kept in zip(x, found["mask"], strict=True):
            expected = sorted(reference.top_k(row, size[1]))
            self.assertEqual(np.flatnonzero(kept).tolist(), expected)

    def test_more_elements_a_column_than_a_byte_counts(self):
        x = reference.activation(5, (1, 2**18))
        expected = jax.jit(lambda x: lax.top_k(jnp.abs(x), 2**17)[1])(x)
        indices = _top_k(x, 2**17, "auto")[1]
        chex.assert_trees_all_equal(indices, np.sort(expected))

    @parameterized.product(size=(16, 100), method=("auto", "top_k"))
    def test_ties_go_to_the_lower_index(self, size, method):
        signs = np.where(np.arange(size) % 2, -1.0, 1.0).astype(np.float32)
        for x in (signs, 0 * signs):
            for k in (1, 4, 9):
                indices = _top_k(x[None], k, method)[1]
                self.assertEqual(indices.tolist(), [list(range(k))])

    @parameterized.product(size=(16, 100), method=("auto", "top_k"))
    def test_nan_then_infinity_count_as_largest(self, size, method):
        x = np.ones((1, size), np.float32)
        x[0, [3, 5, 11]] = [-np.inf, np.nan, np.inf]
        expected = _in_order([[5, 3, 11, 0]], size, method)
        chex.assert_trees_all_equal(_top_k(x, 4, method)[1], expected)

    @parameterized.parameters((16, 2), (16, 12))  # by passes, by ranks
    def test_indices_have_32_bits_where_jax_has_64(self, size, k):
        with jax.enable_x64(True):
            x = jnp.asarray(reference.activation(0, (3, size)), jnp.float64)
            _, indices = elements.top_k(x, k)
            self.assertEqual(indices.dtype, jnp.int32)
            expected = lax.top_k(jnp.abs(x), k)[1]
            np.testing.assert_array_equal(indices, expected)

    def test_small_chunks_need_no_sort(self):
        x = jax.ShapeDtypeStruct((8, 64), jnp.float32)
        for k in (2, 8, 9):
            text = str(jax.make_jaxpr(lambda x, k=k: elements.top_k(x, k))(x))
            for primitive in ("top_k", "sort", "gather", "scatter"):
                self.assertNotIn(primitive, text)

    @parameterized.parameters(65, 2**14)
    def test_large_chunks_need_no_sort(self, size):
        x = jax.ShapeDtypeStruct((8, size), jnp.float32)
        for method in (elements.top_k, elements.top_k_mask):
            text = str(jax.make_jaxpr(lambda x, method=method: method(x, 9))(x))
            for primitive in ("top_k", "sort"):
                self.assertNotIn(f" {primitive}[", text)


class PlacementTest(parameterized.TestCase):
    @parameterized.parameters(*_CASES)
    def test_place_puts_values_where_they_were(self, size, dtype):
        x, found = _all(*size, dtype, "auto")
        expected = np.zeros_like(x)
        for row, (source, kept) in enumerate(zip(x, found["indices"], strict=True)):
            expected[row, kept] = source[kept]
        reference.assert_same_bits(found["placed"], expected)

    @parameterized.parameters(*_CASES)
    def test_compact_and_expand_follow_the_mask(self, size, dtype):
        x, found = _all(*size, dtype, "auto")
        mask = found["mask"]
        reference.assert_same_bits(found["compact"], x[mask].reshape(15, size[1]))
        expected = np.where(mask, x, np.zeros_like(x))
        reference.assert_same_bits(found["expanded"], expected)


if __name__ == "__main__":
    absltest.main()
