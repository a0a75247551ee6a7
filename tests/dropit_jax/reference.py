"""A brute-force twin of selection and residual, in plain NumPy and Python loops.

It shares no code with the library and follows its definition to the letter.
"""

import fractions
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np


def kept(size, rate):
    """k = max(1, floor((1 - rate) * size)), in exact decimal arithmetic."""
    share = 1 - fractions.Fraction(str(rate))
    return max(1, math.floor(share * size))


def chunks(shape, chunk_size):
    """The chunks of a tensor, each a list of flat indices."""
    size = math.prod(shape)
    if chunk_size is None:
        return [list(range(size))]
    samples = shape[0] if len(shape) > 1 else 1
    result = []
    for sample in range(samples):
        flat = range(sample * size // samples, (sample + 1) * size // samples)
        result += [
            list(chunk)
            for start in range(0, len(flat), chunk_size)
            if (chunk := flat[start : start + chunk_size])
        ]
    return result


def magnitudes(x):
    """|x| as integers of the same order, NaN above infinity."""
    bits = np.asarray(x).view(f"u{np.asarray(x).dtype.itemsize}")
    return bits & (np.iinfo(bits.dtype).max >> 1)


def top_k(x, k):
    """Indices of the k largest magnitudes of a vector, ties to the lower index."""
    keys = magnitudes(x).tolist()
    return sorted(range(len(keys)), key=lambda i: (-keys[i], i))[:k]


def kept_indices(x, rate, chunk_size):
    """The flat indices kept of each chunk of x, largest magnitude first."""
    flat = np.asarray(x).reshape(-1)
    return [
        [chunk[i] for i in top_k(flat[chunk], kept(len(chunk), rate))]
        for chunk in chunks(x.shape, chunk_size)
    ]


def sparse(x, rate, chunk_size):
    """The activation as the backward pass rebuilds it."""
    flat = np.asarray(x).reshape(-1)
    rebuilt = np.zeros_like(flat)
    for i in itertools.chain.from_iterable(kept_indices(x, rate, chunk_size)):
        rebuilt[i] = flat[i]
    return rebuilt.reshape(x.shape)


def activation(seed, shape, dtype=jnp.float32):
    """Normal numbers with ties, zeros, infinities, NaN and a denormal strewn in."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape).astype(np.float32)
    special = [0.0, -0.0, 1.5, -1.5, np.nan, np.inf, -np.inf, 1e-42]
    where = rng.random(shape) < 0.3
    x = np.where(where, rng.choice(special, size=shape), x).astype(np.float32)
    return np.asarray(jnp.asarray(x).astype(dtype))


def finite(seed, shape, dtype=jnp.float32):
    """Normal numbers, half of them zero, as after a ReLU."""
    x = jax.nn.relu(jax.random.normal(jax.random.key(seed), shape))
    return x.astype(dtype)


def assert_same_bits(actual, expected):
    """Equality of dtype, shape and every bit: -0.0 is not 0.0, NaN is NaN."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    np.testing.assert_array_equal(
        actual.view(f"u{actual.dtype.itemsize}"),
        expected.view(f"u{expected.dtype.itemsize}"),
    )
