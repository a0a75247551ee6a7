"""How a value is stored from the forward to the backward pass.

A form says what becomes of a value; the arrays that it becomes are a pytree. Codes are
those of `storage.quantization`, in another arrangement: groups lie along the last
axis, and decoding is one expression of arrays of the value's own shape, which XLA
computes inside of the kernel that reads it.
"""

import dataclasses
import functools
import math
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
from dropit_jax.xla import layouts, shardings

# Elements that share a minimum and a scale.
_GROUP = 64


class Form(Protocol):
    """How values of one type are stored."""

    @property
    def is_lossy(self) -> bool:
        """Whether a decoded value differs from the one that was encoded."""

    @property
    def needs_key(self) -> bool:
        """Whether `encode` draws random numbers."""

    def nbytes(self, aval: Any) -> float:
        """The bytes that a value of this type takes; infinite if it cannot be held."""

    def encode(
        self, x: Array, order: Order | None = None, key: Array | None = None
    ) -> Any:
        """Returns the arrays to store for a value.

        Args:
          x: the value.
          order: of its axes in a GPU's memory, the outermost first; `None`: as they
            are, but for those of images.
          key: for forms that need one.
        """

    def decode(self, stored: Any, aval: Any, order: Order | None = None) -> Array:
        """The value of this type, or what is left of it."""


@dataclasses.dataclass(frozen=True)
class Exact:
    """The value as it is."""

    is_lossy = False
    needs_key = False

    def nbytes(self, aval: Any) -> float:
        """As in `Form`."""
        return programs.nbytes(aval)

    def encode(
        self, x: Array, order: Order | None = None, key: Array | None = None
    ) -> Array:
        """As in `Form`."""
        del order, key
        return x

    def decode(self, stored: Array, aval: Any, order: Order | None = None) -> Array:
        """As in `Form`."""
        del aval, order
        return stored

    def __str__(self) -> str:
        return "exact"


@dataclasses.dataclass(frozen=True)
class Bits:
    """Booleans, eight in a byte along the last axis."""

    is_lossy = False
    needs_key = False

    def nbytes(self, aval: Any) -> float:
        """As in `Form`."""
        return math.prod(aval.shape[:-1]) * _packed_size(aval, 1)

    def encode(
        self, x: Array, order: Order | None = None, key: Array | None = None
    ) -> Array:
        """As in `Form`."""
        del key
        return packing.pack(_laid_out(jnp.atleast_1d(x), order), 1)

    def decode(self, stored: Array, aval: Any, order: Order | None = None) -> Array:
        """As in `Form`."""
        bits = packing.unpack(_laid_out(stored, order), 1, (aval.shape or (1,))[-1])
        return bits.astype(bool).reshape(aval.shape)

    def __str__(self) -> str:
        return "1 bit"


@dataclasses.dataclass(frozen=True)
class Codes:
    """Unsigned codes with a minimum and a scale for every group of the last axis.

    Attributes:
      bits: of a code: 2, 4 or 8.
    """

    bits: int

    is_lossy = True
    needs_key = False

    def nbytes(self, aval: Any) -> float:
        """As in `Form`."""
        *rows, last = aval.shape
        _, count = _groups(last)
        return math.prod(rows) * (_packed_size(aval, self.bits) + 4 * count)

    def encode(
        self, x: Array, order: Order | None = None, key: Array | None = None
    ) -> tuple[Array, Array, Array]:
        """As in `Form`."""
        del key
        x = _laid_out(x, order)
        last, levels = x.shape[-1], 2**self.bits - 1
        size, _ = _groups(last)
        wide = x.astype(_computed(x.dtype))
        minimum, scale = quantization.ranges(_grouped(wide), levels)
        above = wide - _spread(minimum, size, last)
        codes = (above * _spread(1 / scale, size, last) + 0.5).astype(jnp.uint8)
        packed = _laid_out(packing.pack(codes, self.bits), order)
        return packed, minimum.astype(jnp.bfloat16), scale.astype(jnp.bfloat16)

    def decode(
        self, stored: tuple[Array, Array, Array], aval: Any, order: Order | None = None
    ) -> Array:
        """As in `Form`."""
        packed, minimum, scale = stored
        last = aval.shape[-1]
        size, _ = _groups(last)
        compute = _computed(aval.dtype)
        codes = packing.unpack(_laid_out(packed, order), self.bits, last)
        low, step = (_spread(x.astype(compute), size, last) for x in (minimum, scale))
        values = codes.astype(compute) * step + low
        if aval.dtype == jnp.float16:
            # The last code may stand for a little more than the largest of its group.
            largest = float(jnp.finfo(jnp.float16).max)
            values = jnp.clip(values, -largest, largest)
        return values.astype(aval.dtype)

    def __str__(self) -> str:
        return f"{self.bits} bits"


@dataclasses.dataclass(frozen=True)
class Selected:
    """The elements or channels that a policy selects (paper, §3.2)."""

    policy: DropIT

    is_lossy = True

    @property
    def needs_key(self) -> bool:
        """As in `Form`."""
        return self.policy.needs_key

    def nbytes(self, aval: Any) -> float:
        """As in `Form`."""
        return _selected_bytes(self.policy, tuple(aval.shape), aval.dtype)

    def encode(
        self, x: Array, order: Order | None = None, key: Array | None = None
    ) -> Residual:
        """As in `Form`."""
        del order
        return residual.compress(x, self.policy, key)

    def decode(self, stored: Residual, aval: Any, order: Order | None = None) -> Array:
        """As in `Form`."""
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
    except (TypeError, ValueError):  # the policy is not for values of this type
        return math.inf


def _laid_out(x: Array, order: Order | None) -> Array:
    return layouts.of_tokens(x) if order is None else layouts.in_order(x, order)


def _groups(last: int) -> tuple[int, int]:
    """How large groups of an axis are, and how many."""
    if last <= 2 * _GROUP and last % _GROUP:
        return last, 1
    return _GROUP, -(-last // _GROUP)


def _grouped(x: Array) -> Array:
    """Returns groups, or elements with their extremes: `(*rows, groups, n)`."""
    *rows, last = x.shape
    size, count = _groups(last)
    shards = shardings.shards(x, -1)
    own = last // shards
    if shards == 1 or own % size == 0:
        return _cut(x, count, size)
    # Devices share groups: the extremes of the parts that they have are gathered.
    part = math.gcd(size, own)
    parts = x.reshape(*rows, last // part, part)
    extremes = jnp.stack([parts.min(-1), parts.max(-1)], axis=len(rows))
    whole = shardings.gather(extremes, len(rows))
    pairs = jnp.moveaxis(_cut(whole, count, size // part), len(rows), len(rows) + 1)
    return pairs.reshape(*rows, count, -1)


def _cut(x: Array, count: int, size: int) -> Array:
    """Cuts the last axis into groups: `(*rows, last) -> (*rows, count, size)`."""
    *rows, last = x.shape
    if count * size > last:  # the last element again changes no extreme
        end = lax.slice_in_dim(x, last - 1, last, axis=-1)
        end = jnp.broadcast_to(end, (*rows, count * size - last))
        x = jnp.concatenate([x, end], axis=-1)
    return x.reshape(*rows, count, size)


def _packed_size(aval: Any, bits: int) -> int:
    """Bytes of the codes of a row, of which each shard is packed by itself."""
    last, shards = (aval.shape or (1,))[-1], shardings.shards_of(aval, -1)
    return shards * packing.packed_size(last // shards, bits)


def _spread(x: Array, size: int, last: int) -> Array:
    """Repeats what groups have for their elements: `(*rows, n) -> (*rows, last)`."""
    *rows, count = x.shape
    if count == 1:
        return lax.broadcast_in_dim(x, (*rows, last), tuple(range(len(rows) + 1)))
    each = lax.broadcast_in_dim(x, (*rows, count, size), tuple(range(len(rows) + 1)))
    return each.reshape(*rows, count * size)[..., :last]


def _computed(dtype: Any) -> Any:
    """The type that codes are computed in."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32
