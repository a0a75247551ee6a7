"""A brute-force reference of the residuals, in plain NumPy and Python loops.

It shares no code with the library and follows the definitions literally.
"""

import fractions
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np


def kept(size, rate):
    """Returns k = max(1, floor((1 - rate) * size)), in exact arithmetic."""
    share = 1 - fractions.Fraction(str(rate))
    return max(1, math.floor(share * size))


def chunks(shape, chunk_size):
    """Returns the chunks of an array, each as a list of flat indices."""
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


def rows(shape, chunk_size):
    """Returns the number of rows of an array, which are stored in whole bytes each.

    A row is the last axis where the chunk size divides that, and a sample otherwise.
    """
    if chunk_size is None:
        return 1
    if shape[-1] % chunk_size == 0:
        return math.prod(shape[:-1])
    return shape[0] if len(shape) > 1 else 1


def packed_bytes(shape, chunk_size, count, bits):
    """Returns the bytes of `count` packed codes of an array, each of `bits` bits.

    For example, 3 codes of 4 bits in each of 2 rows are 2 * 2 bytes.
    """
    per_row = count // rows(shape, chunk_size)
    return rows(shape, chunk_size) * math.ceil(per_row * bits / 8)


def position_bytes(shape, rate, chunk_size):
    """Returns the bytes of the positions as indices, and as a bitmap."""
    cut = chunks(shape, chunk_size)
    count = sum(kept(len(chunk), rate) for chunk in cut)
    longest = max(len(chunk) for chunk in cut)
    bits = next(bits for bits in (4, 8, 16, 32) if longest <= 2**bits)
    return (
        packed_bytes(shape, chunk_size, count, bits),
        packed_bytes(shape, chunk_size, math.prod(shape), 1),
    )


def magnitudes(x):
    """Returns integers in the order of |x|, with NaN above infinity."""
    bits = np.asarray(x).view(f"u{np.asarray(x).dtype.itemsize}")
    return bits & (np.iinfo(bits.dtype).max >> 1)


def top_k(x, k):
    """Returns the indices of the k largest magnitudes, ties to the lower index."""
    keys = magnitudes(x).tolist()
    return sorted(range(len(keys)), key=lambda i: (-keys[i], i))[:k]


def kept_indices(x, rate, chunk_size):
    """Returns the kept flat indices of each chunk of x, largest magnitude first."""
    flat = np.asarray(x).reshape(-1)
    return [
        [chunk[i] for i in top_k(flat[chunk], kept(len(chunk), rate))]
        for chunk in chunks(x.shape, chunk_size)
    ]


def sparse(x, rate, chunk_size):
    """Returns the activation as the backward pass rebuilds it."""
    flat = np.asarray(x).reshape(-1)
    rebuilt = np.zeros_like(flat)
    for i in itertools.chain.from_iterable(kept_indices(x, rate, chunk_size)):
        rebuilt[i] = flat[i]
    return rebuilt.reshape(x.shape)


def kept_channels(x, rate):
    """Returns the sorted indices of the channels of largest L2 norm.

    Ties go to the lower index.
    """
    columns = np.asarray(x, np.float64).reshape(-1, x.shape[-1]).T.tolist()
    energies = [math.fsum(value**2 for value in column) for column in columns]
    order = sorted(range(len(columns)), key=lambda i: (-energies[i], i))
    return sorted(order[: kept(len(columns), rate)])


def sparse_channels(x, indices):
    """Returns the activation with zero in all other channels."""
    rebuilt = np.zeros_like(x)
    for i in indices:
        rebuilt[..., i] = x[..., i]
    return rebuilt


def dropped_means(x, mask):
    """Returns the means of the dropped elements: (n, ..., c) -> (n, c).

    The mask has the kept elements. Where none are dropped the mean is 0.
    """
    x, mask = np.asarray(x, np.float64), np.asarray(mask)
    means = np.zeros((x.shape[0], x.shape[-1]))
    for sample, channel in np.ndindex(*means.shape):
        dropped = x[sample, ..., channel][~mask[sample, ..., channel]].tolist()
        if dropped:
            means[sample, channel] = math.fsum(dropped) / len(dropped)
    return means


def codes(packed, shape, group_size, bits):
    """Returns the codes of packed bytes, row after row, the first in the lowest bits.

    For example, one row of 0x21 and 0x03 has the codes of 4 bits 1, 2, 3.
    """
    per_row = math.prod(shape) // rows(shape, group_size)
    result = []
    for row in np.asarray(packed).reshape(rows(shape, group_size), -1):
        number = int.from_bytes(row.tobytes(), "little")
        result += [number >> (bits * i) & (2**bits - 1) for i in range(per_row)]
    return np.array(result)


def dequantized(quantized):
    """Returns minimum + code · scale, group by group, in float64."""
    shape, group_size = quantized.shape, quantized.group_size
    unpacked = codes(quantized.codes, shape, group_size, quantized.bits)
    minima, scales = (
        np.asarray(array, np.float64).reshape(-1)
        for array in (quantized.minimum, quantized.scale)
    )
    values = np.full(math.prod(shape), np.nan)
    groups = chunks(shape, group_size)
    for group, minimum, scale in zip(groups, minima, scales, strict=True):
        values[group] = minimum + unpacked[group] * scale
    return values.reshape(shape)


def activation(seed, shape, dtype=jnp.float32):
    """Returns normal numbers, 30 % of them replaced by special values.

    These are ties, zeros, infinities, NaN and a denormal number.
    """
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape).astype(np.float32)
    special = [0.0, -0.0, 1.5, -1.5, np.nan, np.inf, -np.inf, 1e-42]
    where = rng.random(shape) < 0.3
    x = np.where(where, rng.choice(special, size=shape), x).astype(np.float32)
    return np.asarray(jnp.asarray(x).astype(dtype))


def finite(seed, shape, dtype=jnp.float32):
    """Returns normal numbers after a ReLU, half of them zero."""
    x = jax.nn.relu(jax.random.normal(jax.random.key(seed), shape))
    return x.astype(dtype)


def integers(seed, shape, dtype=jnp.float32):
    """Returns integers from -8 to 8 without 0, whose sums of squares are exact."""
    rng = np.random.default_rng(seed)
    x = rng.integers(1, 9, shape) * rng.choice([-1, 1], shape)
    return np.asarray(jnp.asarray(x, dtype))


def assert_same_bits(actual, expected):
    """Checks that dtype, shape and all bits are equal: -0.0 is not 0.0, NaN is NaN."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    np.testing.assert_array_equal(
        actual.view(f"u{actual.dtype.itemsize}"),
        expected.view(f"u{expected.dtype.itemsize}"),
    )
