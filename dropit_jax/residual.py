"""The cached form of a layer's input: what is kept of it, and where that belongs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped, UInt8

from dropit_jax import chunking, packing, selection
from dropit_jax.chunking import Chunking
from dropit_jax.policy import DropIT


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "positions"),
    meta_fields=("shape", "dtype", "dropit"),
)
@dataclasses.dataclass(frozen=True)
class Residual:
    """A compressed activation.

    A pytree whose leaves are the arrays that are really stored.

    Attributes:
      values: the kept elements, chunk after chunk along the last axis.
      positions: where in their chunks they belong, in the encoding that
        `encoding(shape, dropit)` names; `None` if everything is kept.
      shape: the activation's shape.
      dtype: the activation's dtype.
      dropit: the policy that made it.
    """

    values: Shaped[Array, "*rows kept"]
    positions: Shaped[Array, "*rows stored"] | None
    shape: tuple[int, ...]
    dtype: jnp.dtype
    dropit: DropIT

    @property
    def nbytes(self) -> int:
        """Bytes of the stored arrays."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def decompress(self) -> Float[Array, "*shape"]:
        """The sparse activation â: kept elements in their places, zero elsewhere."""
        values = self.values.astype(self.dtype)
        if self.positions is None:
            return values
        chunks = chunking.cut(self.shape, self.dropit.chunk_size)
        if encoding(self.shape, self.dropit) == "bitmap":
            restored = _from_bitmap(values, self.positions, chunks, self.dropit)
        else:
            restored = _from_indices(values, self.positions, chunks, self.dropit)
        return restored.reshape(self.shape)


def compress(x: Float[Array, "*shape"], dropit: DropIT) -> Residual:
    """Keeps the elements of `x` that the policy selects (paper §3.2, Figure 2).

    Args:
      x: an activation; its leading axis is the batch. Any real floating dtype.
      dropit: what to keep.

    Returns:
      The kept elements and their positions. Everything is kept, as it is and without
      positions, where no chunk drops anything: at `rate=0`.

    Raises:
      TypeError: `x` is not a real floating-point array.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"DropIT caches real floating-point activations, got {x.dtype}{x.shape}. "
            "Convert the input, or leave this operation without a policy."
        )
    residual = functools.partial(Residual, shape=x.shape, dtype=x.dtype, dropit=dropit)
    stored = x.dtype if dropit.value_dtype is None else jnp.dtype(dropit.value_dtype)
    chunks = chunking.cut(x.shape, dropit.chunk_size)
    if all(dropit.kept(size) == size for _, size in chunks.segments):
        return residual(values=x.astype(stored), positions=None)
    segments = chunking.split(x.reshape(*chunks.rows, chunks.row_size), chunks.segments)
    if encoding(x.shape, dropit) == "bitmap":
        values, positions = _to_bitmap(segments, dropit)
    else:
        values, positions = _to_indices(segments, chunks, dropit)
    return residual(values=values.astype(stored), positions=positions)


def encoding(shape: tuple[int, ...], dropit: DropIT) -> str:
    """`"index"` or `"bitmap"`: how the positions in a tensor of this shape are stored.

    `"auto"` takes the one of fewer bytes, and of two equal ones the index.
    """
    if dropit.encoding != "auto":
        return dropit.encoding
    chunks = chunking.cut(shape, dropit.chunk_size)
    by_index = packing.packed_size(_kept(chunks, dropit), _index_bits(chunks.size))
    by_bitmap = packing.packed_size(chunks.row_size, 1)
    return "bitmap" if by_bitmap < by_index else "index"


def _kept(chunks: Chunking, dropit: DropIT) -> int:
    """Elements kept of a row."""
    return sum(count * size for count, size in _kept_segments(chunks, dropit))


def _kept_segments(chunks: Chunking, dropit: DropIT) -> tuple[tuple[int, int], ...]:
    return tuple((count, dropit.kept(size)) for count, size in chunks.segments)


def _index_bits(chunk_size: int) -> int:
    """Bits of the smallest index type that addresses a chunk."""
    for bits in (4, 8, 16):
        if chunk_size <= 2**bits:
            return bits
    return 32


def _to_indices(
    segments: list[Array], chunks: Chunking, dropit: DropIT
) -> tuple[Array, Array]:
    picked = [
        selection.top_k(s, dropit.kept(s.shape[-1]), dropit.selection) for s in segments
    ]
    values = chunking.join([values for values, _ in picked])
    indices = chunking.join([indices for _, indices in picked])
    bits = _index_bits(chunks.size)
    if bits == 4:
        return values, packing.pack(indices, bits)
    return values, indices.astype(jnp.int32 if bits == 32 else f"uint{bits}")


def _from_indices(
    values: Array, positions: Array, chunks: Chunking, dropit: DropIT
) -> Array:
    if _index_bits(chunks.size) == 4:
        positions = packing.unpack(positions, 4, _kept(chunks, dropit))
    kept = _kept_segments(chunks, dropit)
    return chunking.join(
        [
            selection.place(v, p, size)
            for v, p, (_, size) in zip(
                chunking.split(values, kept),
                chunking.split(positions, kept),
                chunks.segments,
                strict=True,
            )
        ]
    )


def _to_bitmap(
    segments: list[Array], dropit: DropIT
) -> tuple[Array, UInt8[Array, "*rows bytes"]]:
    kept = [dropit.kept(segment.shape[-1]) for segment in segments]
    masks = [
        selection.top_k_mask(segment, k, dropit.selection)
        for segment, k in zip(segments, kept, strict=True)
    ]
    values = [
        selection.compact(segment, mask, k)
        for segment, mask, k in zip(segments, masks, kept, strict=True)
    ]
    return chunking.join(values), packing.pack(chunking.join(masks), 1)


def _from_bitmap(
    values: Array, positions: Array, chunks: Chunking, dropit: DropIT
) -> Array:
    mask = packing.unpack(positions, 1, chunks.row_size).astype(bool)
    return chunking.join(
        [
            selection.expand(v, m)
            for v, m in zip(
                chunking.split(values, _kept_segments(chunks, dropit)),
                chunking.split(mask, chunks.segments),
                strict=True,
            )
        ]
    )
