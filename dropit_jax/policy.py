"""What a layer keeps of its input: the `DropIT` policy."""

import dataclasses
import math
import numbers
from typing import Any, Literal

import numpy as np

Strategy = Literal["min_k", "random"]
Granularity = Literal["element", "channel"]
Encoding = Literal["auto", "index", "bitmap"]
Selection = Literal["auto", "top_k"]
ValueDtype = Literal["bfloat16", "int8", "int4", "int2"]
Fill = Literal["zero", "mean"]

# Every value that a field may take, and the ones that are implemented so far.
_KNOWN: dict[str, tuple[Any, ...]] = {
    "strategy": ("min_k", "random"),
    "granularity": ("element", "channel"),
    "encoding": ("auto", "index", "bitmap"),
    "selection": ("auto", "top_k"),
    "value_dtype": (None, "bfloat16", "int8", "int4", "int2"),
    "fill": ("zero", "mean"),
}
_AVAILABLE: dict[str, tuple[Any, ...]] = _KNOWN | {
    "strategy": ("min_k",),
    "granularity": ("element",),
    "value_dtype": (None, "bfloat16"),
    "fill": ("zero",),
}

# `(1 - rate) * size` may miss a whole number by a rounding error: (1 - 0.9) * 10 is
# 0.9999999999999998, and one element of ten is meant.
_ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True)
class DropIT:
    """What is kept of the input of a layer for its weight gradient (paper §3.2, §3.3).

    The policy is immutable and hashable, so it can be a module's field and a static
    argument of a jitted function. It is checked when it is made.

    Attributes:
      rate: the dropping rate γ, the fraction of every cached tensor that is dropped;
        `0 <= rate < 1`. At 0 the layer is the plain Flax layer.
      strategy: which elements are dropped: `"min_k"`, those of smallest magnitude, or
        `"random"`, a uniform sample.
      granularity: what is dropped: single elements (`"element"`) or whole channels,
        ranked by their L2 norm (`"channel"`).
      chunk_size: the selection's D. Each sample (each slice along the leading axis) is
        flattened and cut into chunks of D consecutive elements, the last one shorter
        if need be, and every chunk selects on its own, so that no chunk crosses a
        sample. `None` makes one selection over the whole tensor.
      encoding: how the kept positions are stored: `"index"`, one index of the smallest
        width that holds D for each kept element; `"bitmap"`, one bit for each
        element of the tensor; `"auto"`, the smaller of the two.
      selection: how the largest of a chunk are found: `"top_k"` calls `lax.top_k`,
        `"auto"` the fastest exact method for this D. The result is the same.
      value_dtype: the type in which kept values are stored; `None`: the activation's.
      fill: what a dropped element is rebuilt as: `"zero"` (the paper), or `"mean"`,
        the mean of the dropped elements of its sample and channel.

    Raises:
      ValueError: a field's value is unknown or out of range.
      TypeError: a field's value has the wrong type.
      NotImplementedError: the value is known, but not implemented yet.
    """

    rate: float = 0.875
    strategy: Strategy = "min_k"
    granularity: Granularity = "element"
    chunk_size: int | None = 16
    encoding: Encoding = "auto"
    selection: Selection = "auto"
    value_dtype: ValueDtype | None = None
    fill: Fill = "zero"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rate", _checked_rate(self.rate))
        object.__setattr__(self, "chunk_size", _checked_chunk_size(self.chunk_size))
        object.__setattr__(self, "value_dtype", _dtype_name(self.value_dtype))
        for field in _KNOWN:
            _check_choice(field, getattr(self, field))

    def kept(self, size: int) -> int:
        """How many of `size` elements that select together are kept.

        `k = max(1, floor((1 - rate) · size))`: rounded down as in the paper (§3.3),
        but never to nothing.
        """
        return min(size, max(1, math.floor((1.0 - self.rate) * size + _ROUNDING)))


def _checked_rate(rate: Any) -> float:
    if isinstance(rate, bool) or not isinstance(rate, numbers.Real):
        raise TypeError(f"DropIT.rate must be a number, got {rate!r}.")
    if not 0 <= float(rate) < 1:
        raise ValueError(
            f"DropIT.rate must be in [0, 1), got {rate!r}: it is the fraction of "
            "elements that is dropped."
        )
    return float(rate)


def _checked_chunk_size(chunk_size: Any) -> int | None:
    if chunk_size is None:
        return None
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, numbers.Integral):
        raise TypeError(
            f"DropIT.chunk_size must be a positive integer or None, got {chunk_size!r}."
        )
    if chunk_size < 1:
        raise ValueError(
            f"DropIT.chunk_size must be at least 1, got {chunk_size!r}; None selects "
            "over the whole tensor."
        )
    return int(chunk_size)


def _dtype_name(value_dtype: Any) -> Any:
    """The name of a dtype given as an object (`jnp.bfloat16`); anything else as is."""
    if value_dtype is None or isinstance(value_dtype, str):
        return value_dtype
    try:
        return np.dtype(value_dtype).name
    except TypeError:
        return value_dtype


def _check_choice(field: str, value: Any) -> None:
    if value not in _KNOWN[field]:
        known = ", ".join(map(repr, _KNOWN[field]))
        raise ValueError(f"DropIT.{field}: unknown value {value!r}; known are {known}.")
    if value not in _AVAILABLE[field]:
        available = ", ".join(map(repr, _AVAILABLE[field]))
        raise NotImplementedError(
            f"DropIT.{field}={value!r} is not implemented yet; use {available}."
        )
