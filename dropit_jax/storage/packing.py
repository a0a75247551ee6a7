"""Small unsigned codes packed into bytes."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped, UInt8

from dropit_jax.storage import last_axis
from dropit_jax.xla import shardings


def packed_size(count: int, bits: int) -> int:
    """Bytes that hold `count` codes of `bits` bits."""
    return -(-count * bits // 8)


def pack(codes: Shaped[Array, "*rows count"], bits: int) -> UInt8[Array, "*rows bytes"]:
    """Packs codes below 2**bits along the last axis, the first into the lowest bits.

    Args:
      codes: integers (or booleans) in [0, 2**bits).
      bits: 1, 2, 4 or 8.

    Returns:
      `packed_size(count, bits)` bytes a row; bits beyond the last code are zero. If the
      last axis is explicitly sharded, each shard is packed by itself.
    """
    codes = codes.astype(jnp.uint8)
    per_byte = 8 // bits
    if per_byte == 1:
        return codes
    if shardings.shards(codes, -1) > 1:
        return last_axis.merge(pack(_by_shard(codes), bits), codes.ndim)
    codes = last_axis.split(codes, per_byte)
    # A sum, not a chain of slices and shifts: XLA's CPU compiler, which heeds no
    # barriers, would fuse such a chain into whatever unpacks it, and compute all that
    # is packed once more for each of the codes.
    return jnp.sum(codes << _places(codes, bits), axis=-1, dtype=jnp.uint8)


def unpack(
    packed: UInt8[Array, "*rows bytes"], bits: int, count: int
) -> UInt8[Array, "*rows {count}"]:
    """The inverse of `pack`, for rows of `count` codes."""
    per_byte = 8 // bits
    if per_byte == 1:
        return packed
    shards = shardings.shards(packed, -1)
    if shards > 1:
        codes = unpack(_by_shard(packed), bits, count // shards)
        return last_axis.merge(codes, packed.ndim)
    each = last_axis.spread(packed, per_byte)
    codes = (each >> _places(each, bits)) & ((1 << bits) - 1)
    codes = codes.reshape(*packed.shape[:-1], packed.shape[-1] * per_byte)
    if codes.shape[-1] == count:
        return codes
    return jax.lax.slice_in_dim(codes, 0, count, axis=-1)


def _places(
    each: UInt8[Array, "*rows codes"], bits: int
) -> UInt8[Array, "*rows codes"]:
    """Where the codes of bytes begin, for each code."""
    return last_axis.along(np.arange(0, 8, bits, dtype=np.uint8), each)


def _by_shard(x: UInt8[Array, "*rows n"]) -> UInt8[Array, "*rows shards part"]:
    """The last axis as one that is sharded and one that is not."""
    shards = shardings.shards(x, -1)
    return x.reshape(*x.shape[:-1], shards, x.shape[-1] // shards)
