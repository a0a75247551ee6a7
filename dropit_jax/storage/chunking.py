"""Cuts tensors into chunks, the elements that compete in one selection."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dropit_jax.storage.shapes import Shape
from dropit_jax.xla import shardings


@dataclasses.dataclass(frozen=True)
class Chunking:
    """A tensor as rows, each of them `count` whole chunks and perhaps a shorter one.

    Attributes:
      rows: sizes of the leading axes, which are not cut.
      count: whole chunks in a row.
      size: elements of a whole chunk.
      tail: elements of the shorter chunk at the end of a row; 0 if there is none.
    """

    rows: Shape
    count: int
    size: int
    tail: int

    @property
    def row_size(self) -> int:
        """Elements in a row."""
        return self.count * self.size + self.tail

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """(number, size) of the whole chunks of a row, then of the shorter one, if any.

        For rows of 300 elements in chunks of 16: `((18, 16), (1, 12))`.
        """
        whole = ((self.count, self.size),)
        return (*whole, (1, self.tail)) if self.tail else whole


def chunking_of(shape: Shape, chunk_size: int | None) -> Chunking:
    """Cuts each sample of a tensor into chunks of `chunk_size` consecutive elements.

    A sample is a slice along the leading axis, flattened in row-major order; a tensor
    of rank 0 or 1 is one sample. A sample of at most `chunk_size` elements is one
    chunk; an empty sample has none. With `chunk_size=None` the whole tensor is one
    chunk.

    In chunks of 16, `(8, 4, 32)` has rows `(8, 4)` of 2 chunks, and `(8, 5, 7)` has
    rows `(8,)` of 2 chunks and a tail of 3 elements.

    If `chunk_size` divides the last axis, only that axis is cut: the chunks are the
    same, but no axes are merged. Merging axes makes XLA gather a sharded tensor on
    every device.
    """
    size = math.prod(shape)
    if chunk_size is None:
        return Chunking((), 1, size, 0)
    if shape and shape[-1] and shape[-1] % chunk_size == 0:
        return Chunking(shape[:-1], shape[-1] // chunk_size, chunk_size, 0)
    rows = shape[:1] if len(shape) > 1 else ()
    row_size = math.prod(shape[len(rows) :])
    if row_size == 0:
        return Chunking(rows, 0, chunk_size, 0)
    if row_size <= chunk_size:
        return Chunking(rows, 1, row_size, 0)
    return Chunking(rows, row_size // chunk_size, chunk_size, row_size % chunk_size)


def as_rows(x: jax.Array, chunks: Chunking) -> jax.Array:
    """Reshapes a tensor of the cut shape: `(*shape) -> (*rows, row_size)`.

    An explicit sharding of the last axis is kept if only that axis is cut and every
    shard holds whole chunks; otherwise all axes but `chunks.rows` are gathered.
    """
    lead = len(chunks.rows)
    cut_last_axis = lead == x.ndim - 1 and not chunks.tail
    if not (cut_last_axis and chunks.count % shardings.shards(x, -1) == 0):
        x = shardings.gather(x, keep=lead)
    return keep_rows_whole(x.reshape(*chunks.rows, chunks.row_size), chunks)


def keep_rows_whole(rows: jax.Array, chunks: Chunking) -> jax.Array:
    """Keeps each row on one device if it is a single chunk or ends with a shorter one.

    These rows cannot be sharded evenly into chunks. XLA would arrive at the same
    sharding by itself, but by many small moves. Without a mesh of `Auto` axes,
    `rows` is returned as it is.
    """
    if chunks.count > 1 and not chunks.tail:
        return rows
    return shardings.whole_rows(rows)


def split(x: jax.Array, sizes: tuple[tuple[int, int], ...]) -> list[jax.Array]:
    """Cuts the last axis into segments of chunks.

    `(*rows, n) -> [(*rows, count, size), ...]`, where n is the sum of count · size.
    For sizes `((18, 16), (1, 12))`: `(8, 300) -> [(8, 18, 16), (8, 1, 12)]`.
    """
    segments, start = [], 0
    for count, size in sizes:
        stop = start + count * size
        segment = x if stop - start == x.shape[-1] else x[..., start:stop]
        segments.append(segment.reshape(*x.shape[:-1], count, size))
        start = stop
    return segments


def join(segments: list[jax.Array]) -> jax.Array:
    """Inverts `split`: `[(*rows, count, size), ...] -> (*rows, n)`."""
    flat = [s.reshape(*s.shape[:-2], s.shape[-2] * s.shape[-1]) for s in segments]
    return concatenate(flat)


def concatenate(parts: Sequence[jax.Array]) -> jax.Array:
    """Concatenates along the last axis; a single part is returned as it is."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
