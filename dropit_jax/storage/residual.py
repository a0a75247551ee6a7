"""Compresses a layer's input to a residual: its kept values and their positions."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from dropit_jax.policy import DropIT, check_policy
from dropit_jax.storage import chunking, dtypes, encodings
from dropit_jax.storage.quantization import Quantized, quantize
from dropit_jax.storage.selection import channels, elements
from dropit_jax.storage.shapes import Shape
from dropit_jax.xla import barriers, shardings

# With fewer elements per sample and channel, `fill="mean"` is refused: the means would
# take more than 1/8 of the activation's elements, which DropIT is there to save.
_MIN_ELEMENTS_PER_MEAN = 8


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "positions", "means"),
    meta_fields=("shape", "dtype", "dropit"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class Residual:
    """A compressed activation, which the forward pass stores for the backward pass.

    A pytree whose leaves are the stored arrays. A residual is equal only to itself.

    Attributes:
      values: kept elements, chunk after chunk along the last axis, or kept channels;
        the whole activation if everything is kept. `Quantized` if `value_dtype` is an
        integer type.
      positions: positions of kept elements, in the encoding that
        `encoding(shape, dropit)` names, or indices of kept channels; `None` if
        everything is kept.
      means: means of the dropped elements of each sample and channel; `None` unless
        `fill="mean"`.
      shape: shape of the activation.
      dtype: dtype of the activation.
      dropit: the policy.
    """

    values: Shaped[Array, "*rows kept"] | Quantized
    positions: Shaped[Array, "*rows stored"] | None
    means: Float[Array, "batch channels"] | None
    shape: Shape
    dtype: jnp.dtype
    dropit: DropIT

    @property
    def nbytes(self) -> int:
        """Bytes of the stored arrays."""
        return sum(
            math.prod(leaf.shape) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(self)
        )

    def decompress(
        self, after: Shaped[Array, "..."] | None = None
    ) -> Float[Array, "*shape"]:
        """Returns the activation â: kept values at their positions, the fill elsewhere.

        Positions are not checked: the values at a repeated position, or for one outside
        the activation, are unspecified.

        Args:
          after: an array; on a CPU, passes over the whole activation are not computed
            before `after` is. XLA's CPU compiler ignores the barriers that do this
            elsewhere.

        Raises:
          ValueError: the arrays are not those that `compress` makes of an activation
            of this shape and dtype.
        """
        found = _array_types(self)
        try:
            wanted = _expected_arrays(self.shape, self.dtype, self.dropit)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"There is no residual of {self.dtype}{self.shape} by {self.dropit}: "
                f"{error}"
            ) from error
        if found != wanted:
            raise ValueError(
                f"A residual of {self.dtype}{self.shape} by {self.dropit} has "
                f"{wanted}, and this one {found}."
            )
        values = self.values
        if isinstance(values, Quantized):
            values = values.dequantize(self.dtype, after)
        if self.positions is None:
            return values.astype(self.dtype)
        placed = _place(
            values, self.positions, self.shape, self.dropit, self.dtype, after
        )
        if self.means is None:
            return placed
        kept = _kept_mask(self.positions, values, self.shape, self.dropit)
        batch, features = self.means.shape
        means = self.means.reshape(batch, *[1] * (len(self.shape) - 2), features)
        return jnp.where(kept, placed, means.astype(self.dtype))


def compress(
    x: Float[Array, "*shape"], dropit: DropIT, key: Array | None = None
) -> Residual:
    """Compresses `x` to the elements that the policy keeps (paper §3.2, Figure 2).

    Args:
      x: an activation; its leading axis is the batch, its last the channels. Any real
        floating dtype of 16 bits or more.
      dropit: the policy.
      key: a PRNG key, for policies that need one; the same key keeps the same elements.

    Returns:
      The kept values and their positions. Where every element is kept (at `rate=0`, or
      in chunks of 1 element), there are no positions.

    Raises:
      TypeError: `x` is not a real floating-point array, or `dropit` not a policy.
      ValueError: the key is missing, or `x` has too few elements per sample and channel
        for `fill="mean"`.
    """
    check_policy(dropit)
    x = jnp.asarray(x)
    _check(x, dropit, key)
    select_key, round_key = (None, None) if key is None else jax.random.split(key)
    values, positions = _select(x, dropit, select_key)
    means = None
    if dropit.fill == "mean" and positions is not None:
        kept = _kept_mask(positions, values, x.shape, dropit)
        means = _dropped_means(x, kept).astype(_float_dtype(x, dropit))
    return Residual(
        values=_store(values, dropit, round_key),
        positions=positions,
        means=means,
        shape=x.shape,
        dtype=x.dtype,
        dropit=dropit,
    )


@functools.lru_cache
def _expected_arrays(shape: Shape, dtype: jnp.dtype, dropit: DropIT) -> dict[str, str]:
    """Returns name and type of each array that `compress` would store."""
    x, key = jax.ShapeDtypeStruct(shape, dtype), jax.eval_shape(jax.random.key, 0)
    return _array_types(jax.eval_shape(lambda x, key: compress(x, dropit, key), x, key))


def _array_types(residual: Residual) -> dict[str, str]:
    """Returns name and type, such as `float32(8, 4)`, of each array of a residual."""
    flat, _ = jax.tree_util.tree_flatten_with_path(residual)
    return {jax.tree_util.keystr(path): _type_name(x) for path, x in flat}


def _type_name(x: Any) -> str:
    return f"{x.dtype}{x.shape}" if hasattr(x, "dtype") else type(x).__name__


def encoding(shape: Shape, dropit: DropIT) -> str:
    """Returns how positions of kept elements are stored: `"index"` or `"bitmap"`.

    Without meaning for kept channels, and where everything is kept.
    """
    return encodings.choose_encoding(
        chunking.chunking_of(shape, dropit.chunk_size), dropit
    )


def _check(x: Array, dropit: DropIT, key: Array | None) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize < 2:
        raise TypeError(
            "DropIT caches real floating-point activations of 16 bits or more, got "
            f"{x.dtype}{x.shape}. Convert the input, or leave this operation without a "
            "policy."
        )
    if dropit.needs_key and key is None:
        raise ValueError(
            f"{dropit} needs a PRNG key: give the operation key=..., or give the "
            "module's apply rngs={'dropit': key}. Lifted transformations such as "
            "nn.scan must split that stream too."
        )
    if dropit.fill == "mean" and math.prod(x.shape[1:-1]) < _MIN_ELEMENTS_PER_MEAN:
        raise ValueError(
            "DropIT.fill='mean' caches a value for every sample and channel, and an "
            f"activation of shape {x.shape} has {math.prod(x.shape[1:-1])} element(s) "
            f"in each; it takes at least {_MIN_ELEMENTS_PER_MEAN}. Use fill='zero' for "
            "this layer."
        )


def _select(x: Array, dropit: DropIT, key: Array | None) -> tuple[Array, Array | None]:
    """Returns the kept values and their positions; `x, None` if everything is kept."""
    random_key = key if dropit.strategy == "random" else None
    if dropit.granularity == "channel":
        count = x.shape[-1] if x.ndim else 1
        k = dropit.kept(count)
        if k == count:
            return x, None
        x = shardings.gather(x, keep=x.ndim - 1)
        if random_key is None:
            kept = channels.largest(x, k)
        else:
            kept = channels.random(random_key, count, k)
        return channels.take(x, kept), kept.astype(_index_dtype(count))
    chunks = chunking.chunking_of(x.shape, dropit.chunk_size)
    if all(dropit.kept(size) == size for _, size in chunks.segments):
        return x, None
    rows = chunking.as_rows(x, chunks)
    scores = None
    if random_key is not None:
        scores = elements.random_scores(random_key, rows.shape)
        scores = shardings.reshard_like(scores, rows)
    return encodings.encode(rows, chunks, dropit, scores, _kept_dtype(x, dropit))


def _index_dtype(count: int) -> jax.typing.DTypeLike:
    """Returns the smallest of uint8, uint16 and int32 for indices below `count`."""
    for bits in (8, 16):
        if count <= 2**bits:
            return f"uint{bits}"
    return jnp.int32


def _place(
    values: Array,
    positions: Array,
    shape: Shape,
    dropit: DropIT,
    dtype: jax.typing.DTypeLike,
    after: Array | None = None,
) -> Array:
    """Returns an array with kept values at their positions and zero elsewhere."""
    if dropit.granularity == "channel":
        place = functools.partial(channels.place, count=shape[-1])
        return barriers.call_after(after, place, values.astype(dtype), positions)
    chunks = chunking.chunking_of(shape, dropit.chunk_size)
    rows = encodings.decode(values, positions, chunks, dropit, dtype, after)
    return rows.reshape(shape)


def _kept_mask(positions: Array, values: Array, shape: Shape, dropit: DropIT) -> Array:
    """Returns whether each element of the activation is kept."""
    ones = jnp.ones(values.shape, jnp.uint8)
    return _place(ones, positions, shape, dropit, ones.dtype).astype(bool)


def _dropped_means(
    x: Float[Array, "batch *positions channels"], kept: Array
) -> Float[Array, "batch channels"]:
    """Returns the mean of each sample and channel's dropped elements; 0 if none are."""
    positions = tuple(range(1, x.ndim - 1))
    wide = jnp.where(kept, 0, x).astype(dtypes.wide(x.dtype))
    dropped = jnp.maximum(jnp.sum(~kept, axis=positions), 1)
    return jnp.sum(wide, axis=positions) / dropped.astype(wide.dtype)


def _kept_dtype(x: Array, dropit: DropIT) -> jax.typing.DTypeLike:
    """Returns the dtype of selected values; codes are made of the activation's own."""
    return x.dtype if dropit.code_bits else _float_dtype(x, dropit)


def _float_dtype(x: Array, dropit: DropIT) -> jax.typing.DTypeLike:
    """Returns the floating dtype in which the policy stores values and means."""
    if dropit.value_dtype is None:
        return x.dtype
    return jnp.bfloat16 if dropit.code_bits else jnp.dtype(dropit.value_dtype)


def _store(values: Array, dropit: DropIT, key: Array | None) -> Array | Quantized:
    if dropit.code_bits is None:
        return values.astype(_float_dtype(values, dropit))
    round_key = key if dropit.rounding == "stochastic" else None
    return quantize(values, dropit.code_bits, dropit.group_size, round_key)
