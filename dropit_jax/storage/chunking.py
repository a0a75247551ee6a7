"""How a tensor is cut into the chunks that select on their own."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dropit_jax.storage.shapes import Shape
from dropit_jax.xla import shardings


@dataclasses.dataclass(frozen=True)
class Chunking:
    """A tensor seen as rows, and each row as whole chunks and perhaps a shorter one.

    Attributes:
      rows: the leading axes, which are left alone.
      count: whole chunks in a row.
      size: elements of a whole chunk.
      tail: elements of the shorter chunk at the end of a row; 0 where there is none.
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
        """The (number, size) of the chunks of a row: whole ones, then the shorter."""
        whole = ((self.count, self.size),)
        return (*whole, (1, self.tail)) if self.tail else whole


def cut(shape: Shape, chunk_size: int | None) -> Chunking:
    """Cuts each sample of a tensor into chunks of `chunk_size` consecutive elements.

    A sample is a slice along the leading axis, flattened in row-major order; a tensor
    of rank 0 or 1 is one sample. With `chunk_size=None` the whole tensor is one chunk.

    Where chunks line up with the last axis, that axis alone is cut: the chunks are the
    same, but no axis is merged with another, and merging axes is what makes XLA gather
    a sharded tensor on every device.
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
    """A tensor of the shape that was cut, as (*rows, row size).

    An explicit sharding is kept where no chunk crosses it, and undone elsewhere.
    """
    lead = len(chunks.rows)
    cut_last_axis = lead == x.ndim - 1 and not chunks.tail
    if not (cut_last_axis and chunks.count % shardings.shards(x, -1) == 0):
        x = shardings.gather(x, keep=lead)
    return whole(x.reshape(*chunks.rows, chunks.row_size), chunks)


def whole(rows: jax.Array, chunks: Chunking) -> jax.Array:
    """Rows whose chunks cannot be shared out evenly, each on one device.

    XLA would come to that by itself, but by many small moves.
    """
    if chunks.count > 1 and not chunks.tail:
        return rows
    return shardings.whole_rows(rows)


def split(x: jax.Array, sizes: tuple[tuple[int, int], ...]) -> list[jax.Array]:
    """Cuts the last axis into segments: (..., Σ count·size) to [(..., count, size)]."""
    segments, start = [], 0
    for count, size in sizes:
        stop = start + count * size
        segment = x if stop - start == x.shape[-1] else x[..., start:stop]
        segments.append(segment.reshape(*x.shape[:-1], count, size))
        start = stop
    return segments


def join(segments: list[jax.Array]) -> jax.Array:
    """The inverse of `split`: [(..., count, size)] to (..., Σ count·size)."""
    flat = [s.reshape(*s.shape[:-2], s.shape[-2] * s.shape[-1]) for s in segments]
    return concatenate(flat)


def concatenate(parts: Sequence[jax.Array]) -> jax.Array:
    """Parts of rows, along the last axis."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
