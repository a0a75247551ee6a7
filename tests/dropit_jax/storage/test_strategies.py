import functools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from dropit_jax import DropIT, Residual, compress
from tests.dropit_jax import reference

_RATES = (0.0, 0.1, 0.5, 0.875, 0.9, 0.99)
_SHAPES = ((1,), (37,), (3, 21), (5, 64), (2, 7, 10), (2, 3, 3, 16), (3, 2, 1, 13))
_CASES = {
    "shape": st.sampled_from(_SHAPES),
    "rate": st.sampled_from(_RATES),
    "dtype": st.sampled_from(("float32", "bfloat16", "float16")),
    "seed": st.integers(0, 2**16),
}


@functools.partial(jax.jit, static_argnums=1)
def _run(x, policy, key=None):
    """What is cached, and the activation rebuilt of it."""
    residual = compress(x, policy, key)
    return residual, residual.decompress()


def _keys(count):
    return jax.random.split(jax.random.key(7), count)


def _held(residual):
    return sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(residual))


def _channel_bytes(x, k):
    """Bytes of k whole channels and of their indices."""
    channels = x.shape[-1]
    index = 1 if channels <= 256 else 2 if channels <= 2**16 else 4
    positions = 0 if k == channels else k * index
    return x.size // channels * k * x.dtype.itemsize + positions


def _element_bytes(x, rate, chunk_size, encoding):
    """Bytes of the elements kept and of their positions."""
    chunks = reference.chunks(x.shape, chunk_size)
    kept = sum(reference.kept(len(chunk), rate) for chunk in chunks)
    if kept == x.size:
        return x.nbytes
    by_index, by_bitmap = reference.position_bytes(x.shape, rate, chunk_size)
    positions = {
        "index": by_index,
        "bitmap": by_bitmap,
        "auto": min(by_index, by_bitmap),
    }
    return kept * x.dtype.itemsize + positions[encoding]


class MinKElementsTest(parameterized.TestCase):
    @hypothesis.given(
        chunk_size=st.sampled_from((16, None)),
        encoding=st.sampled_from(("auto", "index", "bitmap")),
        **_CASES,
    )
    @hypothesis.settings(max_examples=8)
    def test_the_largest_of_each_chunk_are_kept(
        self, shape, rate, dtype, seed, chunk_size, encoding
    ):
        x = reference.activation(seed, shape, jnp.dtype(dtype))
        policy = DropIT(rate, chunk_size=chunk_size, encoding=encoding)
        residual, rebuilt = _run(x, policy)
        reference.assert_same_bits(rebuilt, reference.sparse(x, rate, chunk_size))
        self.assertEqual(residual.nbytes, _held(residual))
        expected = _element_bytes(x, rate, chunk_size, encoding)
        self.assertEqual(residual.nbytes, expected)


class MinKChannelsTest(parameterized.TestCase):
    # Sums of squares of whole numbers are exact in any order, so that equal norms are
    # equal to the last bit.
    @hypothesis.given(**_CASES)
    @hypothesis.settings(max_examples=12)
    def test_the_channels_of_largest_norm_are_kept(self, shape, rate, dtype, seed):
        x = reference.integers(seed, shape, dtype)
        channels = reference.kept_channels(x, rate)
        residual, rebuilt = _run(x, DropIT(rate, granularity="channel"))
        reference.assert_same_bits(rebuilt, reference.sparse_channels(x, channels))
        reference.assert_same_bits(residual.values, x[..., channels])
        self.assertEqual(residual.nbytes, _held(residual))
        self.assertEqual(residual.nbytes, _channel_bytes(x, len(channels)))
        if len(channels) == x.shape[-1]:
            self.assertIsNone(residual.positions)
        else:
            chex.assert_type(residual.positions, jnp.uint8)
            self.assertEqual(residual.positions.tolist(), channels)

    @parameterized.product(
        dtype=("float32", "bfloat16", "float16"), magnitude=(1e-3, 30.0)
    )
    def test_norms_of_real_numbers(self, dtype, magnitude):
        rng = np.random.default_rng(0)
        # No two norms are nearer to each other than a tenth.
        ladder = magnitude * 1.1 ** rng.permutation(24)
        x = rng.normal(size=(4, 5, 5, 24))
        x = ladder * x / np.linalg.norm(x.reshape(-1, 24), axis=0)
        x = np.asarray(jnp.asarray(x, dtype))
        channels = np.sort(np.argsort(-ladder)[:6])
        residual, rebuilt = _run(x, DropIT(0.75, granularity="channel"))
        self.assertEqual(residual.positions.tolist(), channels.tolist())
        self.assertEqual(reference.kept_channels(x, 0.75), channels.tolist())
        reference.assert_same_bits(rebuilt, reference.sparse_channels(x, channels))

    def test_the_norm_is_over_batch_and_positions(self):
        x = np.ones((2, 3, 4), np.float32)
        x[0, :, 2] = 3  # larger in one sample
        x[1, 1, 1] = 9  # larger still at one position
        policy = DropIT(0.5, granularity="channel")
        self.assertEqual(_run(x, policy)[0].positions.tolist(), [1, 2])
        policy = DropIT(0.75, granularity="channel")
        self.assertEqual(_run(x, policy)[0].positions.tolist(), [1])

    @parameterized.parameters(0.5, 0.875, 0.9)
    def test_of_equal_channels_the_first_are_kept(self, rate):
        column = np.random.default_rng(0).normal(size=(3, 5, 1)).astype(np.float32)
        signs = np.where(np.arange(20) % 3, 1, -1).astype(np.float32)
        k = reference.kept(20, rate)
        for x in (column * signs, 0 * column * signs):
            residual, _ = _run(x, DropIT(rate, granularity="channel"))
            self.assertEqual(residual.positions.tolist(), list(range(k)))

    # 0 / 0 is -NaN on x86.
    @parameterized.parameters(np.nan, -np.nan, np.inf, -np.inf)
    def test_channels_that_are_not_finite_are_kept(self, bad):
        x = np.ones((3, 4, 10), np.float32)
        x[..., 2] = 100
        x[1, 2, [4, 7]] = bad
        residual, rebuilt = _run(x, DropIT(0.8, granularity="channel"))
        self.assertEqual(residual.positions.tolist(), [4, 7])
        reference.assert_same_bits(rebuilt, reference.sparse_channels(x, [4, 7]))

    @parameterized.parameters(
        (2, None), (256, "uint8"), (257, "uint16"), (2**16, "uint16"), (2**16 + 1, None)
    )
    def test_positions_take_the_smallest_type(self, channels, dtype):
        x = np.zeros((2, channels), np.float32)
        x[:, -1] = 1
        residual, rebuilt = _run(x, DropIT(0.5, granularity="channel"))
        dtype = dtype or ("uint8" if channels < 256 else "int32")
        self.assertEqual(residual.positions.dtype, dtype)
        kept = [*range(channels // 2 - 1), channels - 1]
        self.assertEqual(residual.positions.tolist(), kept)
        chex.assert_shape(residual.values, (2, channels // 2))
        self.assertEqual(residual.nbytes, _channel_bytes(x, channels // 2))
        reference.assert_same_bits(rebuilt, x)

    def test_fields_about_chunks_do_not_apply(self):
        x = reference.integers(0, (2, 3, 21))
        expected = _run(x, DropIT(0.5, granularity="channel"))
        for fields in ({"chunk_size": None}, {"encoding": "index"}):
            actual = _run(x, DropIT(0.5, granularity="channel", **fields))
            chex.assert_trees_all_equal(
                jax.tree.leaves(actual), jax.tree.leaves(expected)
            )


class RandomTest(parameterized.TestCase):
    @hypothesis.given(
        chunk_size=st.sampled_from((16, 10, 100, None)),
        encoding=st.sampled_from(("index", "bitmap")),
        **_CASES,
    )
    @hypothesis.settings(max_examples=7)
    def test_elements(self, shape, rate, dtype, seed, chunk_size, encoding):
        policy = DropIT(
            rate, strategy="random", chunk_size=chunk_size, encoding=encoding
        )
        x, key = reference.integers(seed, shape, dtype), jax.random.key(seed)
        residual, rebuilt = _run(x, policy, key)
        # No element is zero, so what is not was kept.
        mask = np.asarray(rebuilt, np.float32) != 0
        for chunk in reference.chunks(shape, chunk_size):
            count = mask.reshape(-1)[chunk].sum()
            self.assertEqual(count, reference.kept(len(chunk), rate))
        reference.assert_same_bits(rebuilt, np.where(mask, x, np.zeros_like(x)))
        self._assert_values_do_not_matter(mask, policy, key, seed, dtype)
        self.assertEqual(residual.nbytes, _held(residual))
        expected = _element_bytes(x, rate, chunk_size, encoding)
        self.assertEqual(residual.nbytes, expected)

    @hypothesis.given(**_CASES)
    @hypothesis.settings(max_examples=7)
    def test_channels(self, shape, rate, dtype, seed):
        policy = DropIT(rate, strategy="random", granularity="channel")
        x, key = reference.integers(seed, shape, dtype), jax.random.key(seed)
        residual, rebuilt = _run(x, policy, key)
        k = reference.kept(shape[-1], rate)
        mask = np.asarray(rebuilt, np.float32) != 0
        channels = np.flatnonzero(mask.reshape(-1, shape[-1])[0])
        self.assertLen(channels, k)
        reference.assert_same_bits(rebuilt, reference.sparse_channels(x, channels))
        reference.assert_same_bits(residual.values, x[..., channels])
        if k < shape[-1]:
            self.assertEqual(residual.positions.tolist(), channels.tolist())
        self._assert_values_do_not_matter(mask, policy, key, seed, dtype)
        self.assertEqual(residual.nbytes, _held(residual))
        self.assertEqual(residual.nbytes, _channel_bytes(x, k))

    def _assert_values_do_not_matter(self, mask, policy, key, seed, dtype):
        x = reference.activation(seed, mask.shape, jnp.dtype(dtype))
        rebuilt = _run(x, policy, key)[1]
        reference.assert_same_bits(rebuilt, np.where(mask, x, np.zeros_like(x)))

    @parameterized.parameters({"chunk_size": 16}, {"granularity": "channel"})
    def test_the_key_decides(self, **fields):
        policy = DropIT(0.75, strategy="random", **fields)
        x = reference.integers(0, (4, 3, 40))
        one, other = _keys(2)
        residual = _run(x, policy, one)[0]
        chex.assert_trees_all_equal(residual, _run(x, policy, one)[0])
        chex.assert_trees_all_equal(residual, compress(x, policy, one))
        different = _run(x, policy, other)[1]
        self.assertFalse(np.array_equal(residual.decompress(), different))

    @parameterized.parameters((2, 5, 21), (130,))
    def test_the_way_of_storing_does_not(self, *shape):
        x = reference.activation(0, shape)
        policies = [
            DropIT(0.8, strategy="random", encoding=encoding, selection=selection)
            for encoding, selection in (
                ("index", "auto"),
                ("bitmap", "auto"),
                ("index", "top_k"),
                ("bitmap", "top_k"),
            )
        ]

        @jax.jit
        def run(x, key):
            return [compress(x, policy, key).decompress() for policy in policies]

        first, *others = run(x, jax.random.key(0))
        for other in others:
            reference.assert_same_bits(other, first)

    def test_keys_of_the_old_kind_are_taken(self):
        x, policy = reference.integers(0, (4, 32)), DropIT(strategy="random")
        chex.assert_trees_all_equal(
            _run(x, policy, jax.random.PRNGKey(3)), _run(x, policy, jax.random.key(3))
        )

    def test_every_example_of_a_batch_has_its_own_sample(self):
        policy = DropIT(0.75, strategy="random")
        x, keys = reference.integers(0, (3, 4, 32)), _keys(3)
        batched = jax.vmap(lambda x, key: compress(x, policy, key))
        rebuilt = jax.jit(lambda *args: jax.vmap(Residual.decompress)(batched(*args)))
        rebuilt = rebuilt(x, keys)
        for i in range(3):
            reference.assert_same_bits(rebuilt[i], _run(x[i], policy, keys[i])[1])


class UniformTest(parameterized.TestCase):
    """Over many keys, everything is kept equally often and independently."""

    @parameterized.parameters(
        # shape, fields, what selects together
        ((2, 20), {"chunk_size": 16, "rate": 0.75}, (16, 4)),
        ((2, 16), {"chunk_size": 16, "rate": 0.5}, (16,)),  # ranks, not passes
        ((90,), {"chunk_size": 80, "rate": 0.5}, (80, 10)),  # bisection
        ((3, 12), {"chunk_size": None, "rate": 0.75}, (36,)),
        ((33,), {"chunk_size": 16, "rate": 0.75, "encoding": "bitmap"}, (16, 16, 1)),
        ((2, 24), {"granularity": "channel", "rate": 0.75}, (24,)),
    )
    def test_every_place_and_pair_is_as_likely(self, shape, fields, sizes):
        policy = DropIT(strategy="random", **fields)
        x, count = jnp.ones(shape), 2000

        @jax.jit
        @jax.vmap
        def rebuilt(key):
            return compress(x, policy, key).decompress()

        masks = np.asarray(rebuilt(_keys(count)), np.float64)
        if policy.granularity == "channel":
            masks = masks[:, 0]
        masks = masks.reshape(count, -1)
        # Repeat the chunks for every sample.
        sizes = sizes * (masks.shape[1] // sum(sizes))
        chunk = np.repeat(np.arange(len(sizes)), sizes)
        kept = np.array([reference.kept(size, policy.rate) for size in sizes])
        share = (kept / sizes)[chunk]
        again = ((kept - 1) / np.maximum(np.array(sizes) - 1, 1))[chunk]
        same_chunk = chunk[:, None] == chunk[None, :]
        together = share[:, None] * np.where(same_chunk, again[:, None], share)
        np.fill_diagonal(together, share)
        error = np.sqrt(together * (1 - together) / count)
        frequency = masks.T @ masks / count
        np.testing.assert_array_less(np.abs(frequency - together), 5 * error + 1e-9)


if __name__ == "__main__":
    absltest.main()
