import dataclasses
import functools
import itertools
import re

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


@functools.partial(jax.jit, static_argnums=1)
def _run(x, policy, key=None):
    """What is cached, and the activation rebuilt of it."""
    residual = compress(x, policy, key)
    return residual, residual.decompress()


@functools.cache
def _of_ones(policy):
    return _run(jnp.ones((4, 9, 32)), policy)[0]


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
    "method": st.sampled_from(("auto", "xla", "top_k")),
    "dtype": st.sampled_from(_DTYPES),
    "seed": st.integers(0, 2**16),
}


class TwinTest(parameterized.TestCase):
    @hypothesis.given(**_CASES)
    @hypothesis.settings(max_examples=16)
    def test_residual_is_the_twins(
        self, shape, features, chunk_size, rate, encoding, method, dtype, seed
    ):
        x = reference.activation(seed, (*shape, features), jnp.dtype(dtype))
        policy = DropIT(
            rate, chunk_size=chunk_size, encoding=encoding, selection=method
        )
        residual, rebuilt = _run(x, policy)
        reference.assert_same_bits(rebuilt, reference.sparse(x, rate, chunk_size))
        kept = reference.kept_indices(x, rate, chunk_size)
        flat = x.reshape(-1)
        if residual.positions is None:
            reference.assert_same_bits(residual.values, x)
            return
        by_index, by_bitmap = reference.position_bytes(x.shape, rate, chunk_size)
        if encoding == "bitmap" or (encoding == "auto" and by_bitmap < by_index):
            # Values of a bitmap stand in the order of their positions.
            kept = [sorted(chunk) for chunk in kept]
            self.assertEqual(residual.positions.nbytes, by_bitmap)
        else:
            self.assertEqual(residual.positions.nbytes, by_index)
            if method != "top_k":  # which sorts large chunks too
                sizes = map(len, reference.chunks(x.shape, chunk_size))
                kept = [
                    sorted(chunk) if size > 64 else chunk
                    for chunk, size in zip(kept, sizes, strict=True)
                ]
        expected = flat[list(itertools.chain.from_iterable(kept))]
        reference.assert_same_bits(residual.values.reshape(-1), expected)

    @parameterized.parameters(
        ((1,), 16, "index"),
        ((1,), None, "bitmap"),
        ((3,), 1, "bitmap"),
        ((3,), 64, "index"),
        ((1, 1), 128, "bitmap"),
        ((1, 1), 2**14, "index"),
        ((2, 5), 16, "bitmap"),
        ((2, 5), None, "index"),
        ((1, 17), 16, "index"),
        ((1, 17), 128, "index"),
        ((3, 15), 64, "bitmap"),
        ((3, 15), 2**14, "bitmap"),
        ((2, 3, 100), 1, "index"),
        ((2, 3, 100), 16, "bitmap"),
        ((2, 3, 100), 64, "index"),
        ((2, 3, 100), 128, "bitmap"),
        ((2, 3, 100), None, "index"),
    )
    def test_awkward_sizes(self, shape, chunk_size, encoding):
        policy = DropIT(0.8, chunk_size=chunk_size, encoding=encoding)
        for x in (
            reference.activation(0, shape),
            np.zeros(shape, np.float32),
            np.full(shape, -1.0, np.float32),
            np.full(shape, np.nan, np.float32),
        ):
            _, rebuilt = _run(x, policy)
            reference.assert_same_bits(rebuilt, reference.sparse(x, 0.8, chunk_size))

    @parameterized.product(
        shape=((0, 16), (4, 0), (0,)),
        policy=(DropIT(), DropIT(chunk_size=128, encoding="bitmap")),
    )
    def test_nothing_to_keep(self, shape, policy):
        x = jnp.zeros(shape)
        chex.assert_shape(compress(x, policy).decompress(), shape)

    def test_a_scalar_is_kept(self):
        self.assertEqual(compress(jnp.float32(3), DropIT()).decompress(), 3)


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


class MeanTest(parameterized.TestCase):
    """`fill="mean"`."""

    @parameterized.parameters(
        ((2, 3, 3, 16), "float32", {"encoding": "index"}),
        ((2, 9, 5), "bfloat16", {"encoding": "bitmap", "chunk_size": 7}),
        ((3, 8, 21), "float32", {"chunk_size": None}),
        ((2, 3, 3, 5), "float16", {"strategy": "random"}),
        ((1, 9, 10), "float32", {"strategy": "random", "encoding": "bitmap"}),
        ((2, 2, 1, 4, 6), "float32", {"granularity": "channel"}),
        ((3, 9, 7), "float32", {"granularity": "channel", "strategy": "random"}),
        ((2, 9, 5), "float32", {"value_dtype": "bfloat16"}),
        ((2, 9, 5), "float32", {"value_dtype": "float16", "strategy": "random"}),
        ((2, 9, 16), "float32", {"value_dtype": "int4"}),
        ((2, 9, 6), "bfloat16", {"value_dtype": "int8", "granularity": "channel"}),
    )
    def test_dropped_elements_become_their_mean(self, shape, dtype, fields):
        # None is zero: what is zero without the means was dropped.
        x = (0.5 + reference.integers(0, shape)).astype(jnp.dtype(dtype))
        key = jax.random.key(0)
        kept = _kept_by_min_k(x, fields)

        @jax.jit
        def run(x):
            plain = compress(x, DropIT(0.7, **fields), key)
            residual = compress(x, DropIT(0.7, **fields, fill="mean"), key)
            rebuilt = plain.decompress(), residual.decompress()
            if kept is None:
                unfilled = DropIT(0.7, **fields | {"value_dtype": None})
                rebuilt += (compress(x, unfilled, key).decompress(),)
            return plain, residual, rebuilt

        plain, residual, (plain_rebuilt, rebuilt, *unfilled) = run(x)
        if kept is None:
            kept = np.asarray(unfilled[0], np.float32) != 0
        chex.assert_trees_all_equal(residual.values, plain.values)
        chex.assert_trees_all_equal(residual.positions, plain.positions)
        means = np.asarray(residual.means)
        self.assertEqual(means.shape, (shape[0], shape[-1]))
        value_dtype = fields.get("value_dtype") or dtype
        self.assertEqual(
            means.dtype, "bfloat16" if "int" in value_dtype else value_dtype
        )
        self.assertEqual(residual.nbytes, plain.nbytes + means.nbytes)
        expected = reference.dropped_means(x, kept)
        np.testing.assert_allclose(
            means.astype(np.float64),
            expected,
            rtol=jnp.finfo(means.dtype).eps,
            atol=jnp.finfo(means.dtype).tiny,
        )
        spread = means.reshape(shape[0], *[1] * (len(shape) - 2), shape[-1])
        filled = np.broadcast_to(spread.astype(dtype), shape)
        reference.assert_same_bits(rebuilt, np.where(kept, plain_rebuilt, filled))

    def test_zeros_that_are_kept_stay_zeros(self):
        x = np.zeros((1, 8, 2), np.float32)
        x[0, :4, 0] = [1, 2, 3, 4]
        policy = DropIT(0.5, chunk_size=None, fill="mean")
        _, rebuilt = _run(x, policy)
        # Of 16, 8 are kept: the 4 that are not zero and the first 4 of those that are.
        reference.assert_same_bits(rebuilt, x)

    @parameterized.parameters((16,), (4, 32), (2, 7, 16), (2, 7, 1, 8), (8, 1, 1, 8))
    def test_too_few_elements_to_average_are_refused(self, *shape):
        with pytest.raises(ValueError, match=rf"fill='mean'.*{re.escape(str(shape))}"):
            compress(jnp.ones(shape), DropIT(fill="mean"))

    def test_eight_elements_are_enough(self):
        for shape in ((1, 8, 4), (2, 2, 4, 3)):
            residual = jax.eval_shape(
                lambda shape=shape: compress(jnp.ones(shape), DropIT(fill="mean"))
            )
            self.assertEqual(residual.means.shape, (shape[0], shape[-1]))

    def test_without_dropping_there_are_no_means(self):
        x = reference.finite(0, (2, 9, 16))
        for policy in (DropIT(0.0, fill="mean"), DropIT(chunk_size=1, fill="mean")):
            residual = compress(x, policy)
            self.assertIsNone(residual.means)
            self.assertEqual(residual.nbytes, x.nbytes)
            reference.assert_same_bits(residual.decompress(), x)


def _kept_by_min_k(x, fields):
    """The twin's mask of what is kept at a rate of 0.7; `None` for a random choice."""
    if "strategy" in fields:
        return None
    mask = np.zeros(x.shape, bool)
    if "granularity" in fields:
        mask[..., reference.kept_channels(x, 0.7)] = True
        return mask
    for kept in reference.kept_indices(x, 0.7, fields.get("chunk_size", 16)):
        mask.reshape(-1)[kept] = True
    return mask


class KeyTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"strategy": "random"}, "strategy='random'"),
        (
            {"strategy": "random", "granularity": "channel"},
            "strategy='random', granularity='channel'",
        ),
        (
            {"value_dtype": "int4", "rounding": "stochastic"},
            "value_dtype='int4'.*rounding='stochastic'",
        ),
    )
    def test_a_missing_key_is_named(self, fields, policy):
        with pytest.raises(ValueError, match=rf"DropIT\(.*{policy}.*PRNG key.*key="):
            compress(jnp.ones((2, 32)), DropIT(**fields))

    def test_a_key_that_is_not_needed_changes_nothing(self):
        x, policy = reference.finite(0, (4, 32)), DropIT(value_dtype="int4")
        chex.assert_trees_all_equal(
            compress(x, policy, jax.random.key(0)), compress(x, policy)
        )


class PytreeTest(parameterized.TestCase):
    @parameterized.parameters(16, 24, None)
    def test_batches_and_loops(self, chunk_size):
        policy = DropIT(0.75, chunk_size=chunk_size)
        x = reference.finite(0, (3, 4, 5, 32))
        expected = [reference.sparse(sample, 0.75, chunk_size) for sample in x]
        expected = jnp.stack(expected)

        def step(carry, x):
            return carry, compress(x, policy)

        @jax.jit
        def run(x):
            batched = jax.vmap(lambda x: compress(x, policy))(x)
            _, scanned = jax.lax.scan(step, None, x)
            return (
                jax.vmap(Residual.decompress)(batched),
                jax.lax.map(Residual.decompress, scanned),
            )

        for rebuilt in run(x):
            chex.assert_trees_all_equal(rebuilt, expected)

    def test_leaves_are_what_is_stored(self):
        residual = compress(jnp.ones((4, 32)), DropIT())
        self.assertLen(jax.tree.leaves(residual), 2)
        same = jax.tree.map(lambda leaf: leaf, residual)
        self.assertEqual((same.shape, same.dtype), (residual.shape, residual.dtype))
        self.assertEqual(same.dropit, residual.dropit)

    def test_is_equal_to_itself_alone(self):
        one, other = (compress(jnp.ones((4, 32)), DropIT()) for _ in range(2))
        self.assertEqual(one, one)
        self.assertNotEqual(one, other)
        self.assertLen({one, other, one}, 2)

    @parameterized.product(
        policy=[
            DropIT(),
            DropIT(encoding="bitmap"),
            DropIT(0.0),
            DropIT(granularity="channel"),
            DropIT(value_dtype="int4"),
            DropIT(fill="mean"),
        ],
        change=["absent", "fewer", "other dtype"],
    )
    def test_arrays_of_another_residual_are_refused(self, policy, change):
        residual = _of_ones(policy)
        rebuilt = jax.eval_shape(Residual.decompress, residual)
        chex.assert_shape(rebuilt, (4, 9, 32))
        leaves, structure = jax.tree.flatten(residual)
        tampered = [dataclasses.replace(residual, shape=(4, 9, 64))]
        for index, leaf in enumerate(leaves):
            new = {
                "absent": None,
                "fewer": leaf[..., :-1],
                "other dtype": leaf.astype("int32"),
            }[change]
            changed = [*leaves[:index], new, *leaves[index + 1 :]]
            tampered.append(jax.tree.unflatten(structure, changed))
        for each in tampered:
            with pytest.raises(ValueError, match=r"A residual of .* and this one"):
                each.decompress()

    @parameterized.parameters(
        ("values", 5, "and this one .*int"),
        ("positions", "ab", "and this one .*str"),
        ("shape", None, "There is no residual of float32None"),
        ("shape", (4, "9"), r"There is no residual of float32\(4, '9'\)"),
        ("dtype", None, "(There is no|A) residual of None"),
        ("dtype", jnp.dtype("int32"), r"There is no residual of int32\(4, 9, 32\)"),
    )
    def test_fields_of_something_else_are_refused(self, name, value, message):
        residual = _of_ones(DropIT())
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(residual, **{name: value}).decompress()


if __name__ == "__main__":
    absltest.main()
