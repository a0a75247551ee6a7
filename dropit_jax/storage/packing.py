"""Packs codes of 1, 2 or 4 bits into bytes; codes of 8 bits are bytes already."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped, UInt8

from dropit_jax.storage import last_axis
from dropit_jax.xla import shardings


def packed_size(count: int, bits: int) -> int:
    """Returns the number of bytes that `count` codes of `bits` bits take."""
    return -(-count * bits // 8)


def pack(codes: Shaped[Array, "*rows count"], bits: int) -> UInt8[Array, "*rows bytes"]:
    """Packs codes along the last axis, the first code of a byte in its lowest bits.

    In 4 bits, `[1, 2, 3]` is `[0x21, 0x03]`; in 1 bit, `[1, 0, 1]` is `[0b101]`.

    Args:
      codes: integers (or booleans) in [0, 2**bits).
      bits: bits of a code: 1, 2, 4 or 8.

    Returns:
      `packed_size(count, bits)` bytes for each row; bits beyond the last code are 0. If
      the last axis is explicitly sharded, each shard is packed by itself, and its codes
      may end within a byte: the 3 + 3 codes of two shards take 2 + 2 bytes in 4 bits.
    """
    codes = codes.astype(jnp.uint8)
    per_byte = 8 // bits
    if per_byte == 1:
        return codes
    if shardings.shards(codes, -1) > 1:
        return last_axis.merge(pack(_by_shard(codes), bits), codes.ndim)
    codes = last_axis.split(codes, per_byte)
    # A sum, not a chain of slices and shifts: XLA's CPU compiler, which ignores
    # barriers, would fuse the chain into the unpacking, and recompute the codes once
    # for each slice.
    return jnp.sum(codes << _bit_offsets(codes, bits), axis=-1, dtype=jnp.uint8)


def unpack(
    packed: UInt8[Array, "*rows bytes"], bits: int, count: int
) -> UInt8[Array, "*rows {count}"]:
    """Inverts `pack`: `(*rows, bytes) -> (*rows, count)`.

    Args:
      packed: bytes that `pack` returned, explicitly sharded as it returned them.
      bits: bits of a code: 1, 2, 4 or 8.
      count: codes of a row.
    """
    per_byte = 8 // bits
    if per_byte == 1:
        return packed
    shards = shardings.shards(packed, -1)
    if shards > 1:
        codes = unpack(_by_shard(packed), bits, count // shards)
        return last_axis.merge(codes, packed.ndim)
    each = last_axis.repeat_in_blocks(packed, per_byte)
    codes = (each >> _bit_offsets(each, bits)) & ((1 << bits) - 1)
    codes = codes.reshape(*packed.shape[:-1], packed.shape[-1] * per_byte)
    if codes.shape[-1] == count:
        return codes
    return jax.lax.slice_in_dim(codes, 0, count, axis=-1)


def _bit_offsets(
    each: UInt8[Array, "*rows codes"], bits: int
) -> UInt8[Array, "*rows codes"]:
    """Returns the first bit of each code of a byte, broadcast to `each`."""
    return last_axis.broadcast_to_rows(np.arange(0, 8, bits, dtype=np.uint8), each)


def _by_shard(x: UInt8[Array, "*rows n"]) -> UInt8[Array, "*rows shards part"]:
    """Splits the sharded last axis: `(*rows, n) -> (*rows, shards, n // shards)`."""
    shards = shardings.shards(x, -1)
    return x.reshape(*x.shape[:-1], shards, x.shape[-1] // shards)
