"""Forms: how a value is encoded for storage and decoded in the backward pass.

The encoded value is a pytree of arrays. `Codes` has the codes of
`storage.quantization` in another arrangement: groups lie along the last axis, and every
array of the decoder has the shape of the value. XLA then fuses the decoder into the GPU
kernel that reads the value.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from dropit_jax.policy import DropIT
from dropit_jax.storage import packing, quantization, residual
from dropit_jax.storage.residual import Residual
from dropit_jax.transform.forms.orders import Order
from dropit_jax.transform.tracing import program as programs
from dropit_jax.xla import cpu_calls, layouts, shardings
from dropit_jax.xla.platforms import by_platform

# Elements that share a minimum and a scale.
_GROUP = 64


class Form(Protocol):
    """Encodes and decodes values; hashable, as traces are shared by form."""

    @property
    def is_lossy(self) -> bool:
        """Returns whether a decoded value may differ from the encoded one."""

    @property
    def needs_key(self) -> bool:
        """Returns whether `encode` draws random numbers."""

    def nbytes(self, aval: Any) -> float:
        """Returns the bytes of an encoded value of this type.

        Infinite if the form cannot store the type.
        """

    def encode(
        self, x: Array, order: Order | None = None, key: Array | None = None
    ) -> Any:
        """Returns the arrays to store for a value.

        Args:
          x: the value.
          order: the order of its axes in a GPU's memory, the outermost first. `None`:
            row-major up to three axes; more may be images, and XLA chooses.
          key: a PRNG key, where `needs_key`.
        """

    def decode(self, stored: Any, aval: Any, order: Order | None = None) -> Array:
        """Returns the value, or its approximation.

        Args:
          stored: the result of `encode`.
          aval: the type of the value.
          order: as in `encode`.
        """


# Jitted, so that all values of one type share one trace, as the layers of a model do.
@functools.partial(jax.jit, static_argnames=("form", "order"), inline=True)
def encode(x: Array, form: Form, order: Order | None, key: Array | None = None) -> Any:
    """Returns `form.encode(x, order, key)`."""
    return form.encode(x, order, key)


@functools.partial(jax.jit, static_argnames=("form", "aval", "order"), inline=True)
def decode(stored: Any, form: Form, aval: Any, order: Order | None) -> Array:
    """Returns `form.decode(stored, aval, order)`."""
    return form.decode(stored, aval, order)


@dataclasses.dataclass(frozen=True)
class Exact:
    """Stores a value unchanged."""

    is_lossy = False
    needs_key = False

    def nbytes(self, aval: Any) -> float:
        """Returns the bytes of the value."""
        return programs.nbytes(aval)

    def encode(
        self, x: Array, order: Order | None = None, key: Array | None = None
    ) -> Array:
        """Returns the value itself."""
        del order, key
        return x

    def decode(self, stored: Array, aval: Any, order: Order | None = None) -> Array:
        """Returns the value."""
        del aval, order
        return stored

    def __str__(self) -> str:
        return "exact"


@dataclasses.dataclass(frozen=True)
class Bits:
    """Stores booleans as a bit mask along the last axis.

    `bool[4, 10] -> uint8[4, 2]`: 10 bits and 6 of padding a row, 8 bytes in all.
    """

    is_lossy = False
    needs_key = False

    def nbytes(self, aval: Any) -> float:
        """Returns the bytes of the bit mask."""
        return math.prod(aval.shape[:-1]) * _packed_size(aval, 1)

    def encode(
        self, x: Array, order: Order | None = None, key: Array | None = None
    ) -> Array:
        """Returns the booleans as a bit mask."""
        del key
        encoded: Array = _in_one_call(functools.partial(self._encode, order=order))(x)
        return encoded

    def _encode(self, x: Array, order: Order | None) -> Array:
        return packing.pack(_in_layout(jnp.atleast_1d(x), order), 1)

    def decode(self, stored: Array, aval: Any, order: Order | None = None) -> Array:
        """Returns the booleans of a bit mask."""
        bits = packing.unpack(_in_layout(stored, order), 1, (aval.shape or (1,))[-1])
        return bits.astype(bool).reshape(aval.shape)

    def __str__(self) -> str:
        return "1 bit"


@dataclasses.dataclass(frozen=True)
class Codes:
    """Stores unsigned codes, and a minimum and a scale for each group.

    The values are real floating-point arrays of one axis or more. Groups are 64
    consecutive elements of the last axis, or all of a short one (see `_groups`). With 4
    bits, `float32[2, 200] -> uint8[2, 100], bfloat16[2, 4], bfloat16[2, 4]`: 200 bytes
    of codes, 16 of minima and 16 of scales, instead of 1,600. All elements of a group
    with a NaN or an infinity decode to NaN.

    Attributes:
      bits: bits of a code: 2, 4 or 8.
    """

    bits: int

    is_lossy = True
    needs_key = False

    def nbytes(self, aval: Any) -> float:
        """Returns the bytes of codes, minima and scales; does not check the dtype."""
        *rows, last = aval.shape
        _, count = _groups(last)
        return math.prod(rows) * (_packed_size(aval, self.bits) + 4 * count)

    def encode(
        self, x: Array, order: Order | None = None, key: Array | None = None
    ) -> tuple[Array, Array, Array]:
        """Returns packed codes, minima and scales."""
        del key
        encoded: tuple[Array, Array, Array]
        encoded = _in_one_call(functools.partial(self._encode, order=order))(x)
        return encoded

    def _encode(self, x: Array, order: Order | None) -> tuple[Array, Array, Array]:
        x = _in_layout(x, order)
        last, levels = x.shape[-1], 2**self.bits - 1
        size, _ = _groups(last)
        wide = x.astype(_compute_dtype(x.dtype))
        minimum, scale = quantization.group_ranges(_grouped(wide), levels)
        above = wide - _spread(minimum, size, last)
        # Not negative, so that the cast rounds down.
        codes = (above * _spread(1 / scale, size, last) + 0.5).astype(jnp.uint8)
        packed = _in_layout(packing.pack(codes, self.bits), order)
        return packed, minimum.astype(jnp.bfloat16), scale.astype(jnp.bfloat16)

    def decode(
        self, stored: tuple[Array, Array, Array], aval: Any, order: Order | None = None
    ) -> Array:
        """Returns `minimum + scale * code` for each element, in the dtype of `aval`."""
        packed, minimum, scale = stored
        last = aval.shape[-1]
        size, _ = _groups(last)
        compute = _compute_dtype(aval.dtype)
        codes = packing.unpack(_in_layout(packed, order), self.bits, last)
        low, step = (_spread(x.astype(compute), size, last) for x in (minimum, scale))
        values = codes.astype(compute) * step + low
        if aval.dtype == jnp.float16:
            # The highest code may decode to slightly more than the group's maximum.
            largest = float(jnp.finfo(jnp.float16).max)
            values = jnp.clip(values, -largest, largest)
        return values.astype(aval.dtype)

    def __str__(self) -> str:
        return f"{self.bits} bits"


@dataclasses.dataclass(frozen=True)
class Selected:
    """Stores the elements or channels that a policy selects (paper, §3.2)."""

    policy: DropIT

    is_lossy = True

    @property
    def needs_key(self) -> bool:
        """Returns whether the policy draws random numbers."""
        return self.policy.needs_key

    def nbytes(self, aval: Any) -> float:
        """Returns the bytes of the residual; infinite for types the policy refuses."""
        return _selected_bytes(self.policy, tuple(aval.shape), aval.dtype)

    def encode(
        self, x: Array, order: Order | None = None, key: Array | None = None
    ) -> Residual:
        """Returns the elements or channels that the policy keeps, and their places."""
        del order
        return residual.compress(x, self.policy, key)

    def decode(self, stored: Residual, aval: Any, order: Order | None = None) -> Array:
        """Returns the kept elements in their places, the policy's fill elsewhere."""
        del aval, order
        return stored.decompress()

    def __str__(self) -> str:
        return f"DropIT {self.policy.rate:g}"


@functools.lru_cache(maxsize=4096)
def _selected_bytes(policy: DropIT, shape: tuple[int, ...], dtype: Any) -> float:
    key = jax.random.key(0) if policy.needs_key else None
    compress = functools.partial(residual.compress, dropit=policy, key=key)
    try:
        return jax.eval_shape(compress, jax.ShapeDtypeStruct(shape, dtype)).nbytes
    except (TypeError, ValueError):  # the policy does not take values of this type
        return math.inf


def _in_one_call(encode: Callable[[Array], Any]) -> Callable[[Array], Any]:
    """Returns `encode`; in a program for one CPU, in a call that XLA does not inline.

    XLA's CPU compiler would recompute the value for each pass over it, and compile the
    same loops again in every layer.
    """
    return by_platform(encode, one_cpu=cpu_calls.not_inlined(encode))


def _in_layout(x: Array, order: Order | None) -> Array:
    return (
        layouts.row_major_unless_images(x)
        if order is None
        else layouts.in_order(x, order)
    )


def _groups(last: int) -> tuple[int, int]:
    """Returns the size and the number of the groups of an axis of `last` elements.

    200 elements give `(64, 4)`, with 8 elements in the last group. An axis of at most
    128 elements that 64 does not divide is one group: 100 elements give `(100, 1)`.
    """
    if last <= 2 * _GROUP and last % _GROUP:
        return last, 1
    return _GROUP, -(-last // _GROUP)


def _grouped(x: Array) -> Array:
    """Returns arrays with the extremes of the groups: `(*rows, last) -> (*rows, g, n)`.

    The n elements are the group itself, or minima and maxima of its parts where the
    last axis is sharded within groups: (1, 256) on 8 devices has 4 groups, each of two
    parts of 32 elements, and gives (1, 4, 4).
    """
    *rows, last = x.shape
    size, count = _groups(last)
    shards = shardings.shards(x, -1)
    own = last // shards
    if shards == 1 or own % size == 0:
        return _split_groups(x, count, size)
    # To gather extremes moves fewer bytes between devices than to gather the elements.
    part = math.gcd(size, own)
    parts = x.reshape(*rows, last // part, part)
    extremes = jnp.stack([parts.min(-1), parts.max(-1)], axis=len(rows))
    whole = shardings.gather(extremes, len(rows))
    pairs = jnp.moveaxis(
        _split_groups(whole, count, size // part), len(rows), len(rows) + 1
    )
    return pairs.reshape(*rows, count, -1)


def _split_groups(x: Array, count: int, size: int) -> Array:
    """Splits the last axis into groups: `(*rows, last) -> (*rows, count, size)`."""
    *rows, last = x.shape
    if count * size > last:  # padding by the last element changes no extreme
        end = lax.slice_in_dim(x, last - 1, last, axis=-1)
        end = jnp.broadcast_to(end, (*rows, count * size - last))
        x = jnp.concatenate([x, end], axis=-1)
    return x.reshape(*rows, count, size)


def _packed_size(aval: Any, bits: int) -> int:
    """Returns the bytes of a row of codes, whose shards are packed separately."""
    last, shards = (aval.shape or (1,))[-1], shardings.shards_of(aval, -1)
    return shards * packing.packed_size(last // shards, bits)


def _spread(x: Array, size: int, last: int) -> Array:
    """Repeats numbers of groups for their elements: `(*rows, groups) -> (*rows, last)`.

    A group has `size` elements, the last one what remains of `last`.
    """
    *rows, count = x.shape
    if count == 1:
        return lax.broadcast_in_dim(x, (*rows, last), tuple(range(len(rows) + 1)))
    each = lax.broadcast_in_dim(x, (*rows, count, size), tuple(range(len(rows) + 1)))
    return each.reshape(*rows, count * size)[..., :last]


def _compute_dtype(dtype: Any) -> Any:
    """Returns the dtype in which codes of `dtype` are encoded and decoded."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32
