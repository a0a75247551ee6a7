import itertools
import math

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from dropit_jax import DropIT, Residual, compress
from tests.dropit_jax import reference

_compress = jax.jit(compress, static_argnums=1)
_decompress = jax.jit(Residual.decompress)

_DTYPES = ("float32", "bfloat16", "float16")
_RATES = (0.0, 0.1, 0.5, 0.75, 0.8, 0.875, 0.9, 0.99)

_CASES = {
    "shape": st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple),
    "features": st.sampled_from((1, 3, 8, 16, 20, 32, 48)),
    "chunk_size": st.one_of(
        st.none(), st.sampled_from((1, 2, 8, 16, 24, 64, 65, 1000))
    ),
    "rate": st.sampled_from(_RATES),
    "encoding": st.sampled_from(("auto", "index", "bitmap")),
    "method": st.sampled_from(("auto", "top_k")),
    "dtype": st.sampled_from(_DTYPES),
    "seed": st.integers(0, 2**16),
}


class TwinTest(parameterized.TestCase):
    @hypothesis.given(**_CASES)
    @hypothesis.settings(max_examples=150)
    def test_residual_is_the_twins(
        self, shape, features, chunk_size, rate, encoding, method, dtype, seed
    ):
        x = reference.activation(seed, (*shape, features), jnp.dtype(dtype))
        policy = DropIT(
            rate, chunk_size=chunk_size, encoding=encoding, selection=method
        )
        residual = _compress(x, policy)
        reference.assert_same_bits(
            _decompress(residual), reference.sparse(x, rate, chunk_size)
        )
        kept = reference.kept_indices(x, rate, chunk_size)
        flat = x.reshape(-1)
        if residual.positions is None:
            reference.assert_same_bits(residual.values, x)
            return
        by_index, by_bitmap = _position_bytes(x, rate, chunk_size)
        if encoding == "bitmap" or (encoding == "auto" and by_bitmap < by_index):
            # Values of a bitmap stand in the order of their positions.
            kept = [sorted(chunk) for chunk in kept]
            self.assertEqual(residual.positions.nbytes, by_bitmap)
        else:
            self.assertEqual(residual.positions.nbytes, by_index)
        expected = flat[list(itertools.chain.from_iterable(kept))]
        reference.assert_same_bits(residual.values.reshape(-1), expected)

    @parameterized.product(
        shape=((1,), (3,), (1, 1), (2, 5), (1, 17), (3, 15), (2, 3, 100)),
        chunk_size=(1, 16, 64, 2**14, None),
        encoding=("index", "bitmap"),
    )
    def test_awkward_sizes(self, shape, chunk_size, encoding):
        for x in (
            reference.activation(0, shape),
            np.zeros(shape, np.float32),
            np.full(shape, -1.0, np.float32),
            np.full(shape, np.nan, np.float32),
        ):
            policy = DropIT(0.8, chunk_size=chunk_size, encoding=encoding)
            reference.assert_same_bits(
                _decompress(_compress(x, policy)), reference.sparse(x, 0.8, chunk_size)
            )

    @parameterized.parameters((0, 16), (4, 0), (0,))
    def test_nothing_to_keep(self, *shape):
        x = jnp.zeros(shape)
        chex.assert_shape(compress(x, DropIT()).decompress(), shape)

    def test_a_scalar_is_kept(self):
        self.assertEqual(compress(jnp.float32(3), DropIT()).decompress(), 3)


def _position_bytes(x, rate, chunk_size):
    """Bytes of the positions as indices and as a bitmap.

    Both fill up the last byte of a row, which is the last axis where chunks line up
    with it, and a sample otherwise.
    """
    chunks = reference.chunks(x.shape, chunk_size)
    kept = sum(reference.kept(len(chunk), rate) for chunk in chunks)
    if chunk_size is None:
        rows = 1
    elif x.shape[-1] % chunk_size == 0:
        rows = x.size // x.shape[-1]
    else:
        rows = x.shape[0] if x.ndim > 1 else 1
    longest = max(len(chunk) for chunk in chunks)
    bits = next(bits for bits in (4, 8, 16, 32) if longest <= 2**bits)
    return rows * math.ceil(kept // rows * bits / 8), rows * math.ceil(
        x.size / rows / 8
    )


class StorageTest(parameterized.TestCase):
    @parameterized.parameters(
        # shape, rate, D, encoding -> dtype of the positions, bytes of positions
        ((4, 8, 32), 0.875, 16, "index", "uint8", 4 * 8 * 4 // 2),
        ((4, 8, 48), 0.8, 16, "index", "uint8", 4 * 8 * 5),  # 9 half bytes a row
        ((4, 8, 32), 0.875, 32, "index", "uint8", 4 * 8 * 4),
        ((4, 8, 256), 0.875, 256, "index", "uint8", 4 * 8 * 32),
        ((4, 600), 0.875, 300, "index", "uint16", 4 * 2 * 37 * 2),
        ((2, 2**16), 0.99, 2**16, "index", "uint16", 2 * 655 * 2),
        ((1, 2**16 + 8), 0.99, None, "index", "int32", 655 * 4),
        ((4, 8, 32), 0.875, 16, "bitmap", "uint8", 4 * 8 * 4),
        ((4, 3, 7), 0.875, 16, "bitmap", "uint8", 4 * 3),
        # auto: the smaller, and the index of two equal ones
        ((4, 8, 32), 0.875, 16, "auto", "uint8", 4 * 8 * 2),
        ((4, 8, 32), 0.75, 16, "auto", "uint8", 4 * 8 * 4),
        ((4, 8, 32), 0.5, 16, "auto", "uint8", 4 * 8 * 4),
        ((1, 2**14), 0.9, 2**14, "auto", "uint8", 2**14 // 8),
        ((1, 2**14), 0.99, 2**14, "auto", "uint16", 163 * 2),
    )
    def test_positions(self, shape, rate, chunk_size, encoding, dtype, size):
        policy = DropIT(rate, chunk_size=chunk_size, encoding=encoding)
        x = jnp.ones(shape)
        residual = jax.eval_shape(lambda: compress(x, policy))
        self.assertEqual(residual.positions.dtype, dtype)
        chunks = reference.chunks(shape, chunk_size)
        kept = sum(reference.kept(len(chunk), rate) for chunk in chunks)
        self.assertEqual(residual.values.size, kept)
        self.assertEqual(residual.nbytes, kept * 4 + size)

    def test_nbytes_is_what_the_arrays_hold(self):
        residual = compress(jnp.ones((4, 8, 32)), DropIT())
        held = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(residual))
        self.assertEqual(residual.nbytes, held)

    @parameterized.parameters(0.0, 0.875)
    def test_bfloat16_values(self, rate):
        x = reference.finite(0, (4, 8, 32))
        residual = compress(x, DropIT(rate, value_dtype="bfloat16"))
        chex.assert_type(residual.values, jnp.bfloat16)
        rebuilt = residual.decompress()
        chex.assert_type(rebuilt, jnp.float32)
        kept = jnp.asarray(reference.sparse(x, rate, 16))
        expected = kept.astype(jnp.bfloat16).astype(jnp.float32)
        reference.assert_same_bits(rebuilt, expected)

    def test_nothing_is_positioned_where_nothing_is_dropped(self):
        x = reference.finite(0, (4, 8, 32))
        for policy in (DropIT(0.0), DropIT(0.9, chunk_size=1)):
            residual = compress(x, policy)
            self.assertIsNone(residual.positions)
            self.assertEqual(residual.nbytes, x.nbytes)

    @parameterized.parameters("int32", "bool", "complex64")
    def test_other_dtypes_are_refused(self, dtype):
        with pytest.raises(TypeError, match=rf"floating-point.*{dtype}\(2, 3\)"):
            compress(jnp.ones((2, 3), dtype), DropIT())

    def test_numpy_arrays_are_taken(self):
        x = reference.activation(0, (4, 32))
        reference.assert_same_bits(
            compress(x, DropIT()).decompress(), reference.sparse(x, 0.875, 16)
        )


class PytreeTest(parameterized.TestCase):
    @parameterized.parameters(16, 24, None)
    def test_batches_and_loops(self, chunk_size):
        policy = DropIT(0.75, chunk_size=chunk_size)
        x = reference.finite(0, (3, 4, 5, 32))
        expected = [reference.sparse(sample, 0.75, chunk_size) for sample in x]
        expected = jnp.stack(expected)
        batched = jax.vmap(lambda x: compress(x, policy))(x)
        chex.assert_trees_all_equal(jax.vmap(Residual.decompress)(batched), expected)

        def step(carry, x):
            return carry, compress(x, policy)

        _, scanned = jax.lax.scan(step, None, x)
        chex.assert_trees_all_equal(jax.lax.map(Residual.decompress, scanned), expected)

    def test_leaves_are_what_is_stored(self):
        residual = compress(jnp.ones((4, 32)), DropIT())
        self.assertLen(jax.tree.leaves(residual), 2)
        same = jax.tree.map(lambda leaf: leaf, residual)
        self.assertEqual((same.shape, same.dtype), (residual.shape, residual.dtype))
        self.assertEqual(same.dropit, residual.dropit)


if __name__ == "__main__":
    absltest.main()
