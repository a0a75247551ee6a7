"""`DropIT`, the policy by which a layer stores its input for the backward pass."""

import dataclasses
import math
import numbers
from typing import Any, Literal

import numpy as np

Strategy = Literal["min_k", "random"]
Granularity = Literal["element", "channel"]
Encoding = Literal["auto", "index", "bitmap"]
Selection = Literal["auto", "xla", "top_k"]
ValueDtype = Literal["bfloat16", "float16", "int8", "int4", "int2"]
Rounding = Literal["nearest", "stochastic"]
Fill = Literal["zero", "mean"]

# The values that each field may take.
_KNOWN: dict[str, tuple[Any, ...]] = {
    "strategy": ("min_k", "random"),
    "granularity": ("element", "channel"),
    "encoding": ("auto", "index", "bitmap"),
    "selection": ("auto", "xla", "top_k"),
    "value_dtype": (None, "bfloat16", "float16", "int8", "int4", "int2"),
    "rounding": ("nearest", "stochastic"),
    "fill": ("zero", "mean"),
}
_CODE_BITS = {"int8": 8, "int4": 4, "int2": 2}

# `(1 - rate) * size` may miss a whole number by a rounding error: (1 - 0.9) * 10 is
# 0.9999999999999998, where one element of ten is to be kept.
_ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True)
class DropIT:
    """The storage of a layer's input for its weight gradient (paper §3.2, §3.3).

    The policy is immutable and hashable, so it can be a module's field and a static
    argument of a jitted function. Its fields are checked when it is created.

    Attributes:
      rate: the dropping rate γ, `0 <= rate < 1`. A chunk of D elements keeps
        `max(1, floor((1 - rate) · D))` of them, so rate 0.95 drops 15 of 16. At 0
        nothing is dropped, and only `value_dtype` compresses.
      strategy: which elements are dropped: `"min_k"`, those of smallest magnitude, or
        `"random"`, a uniform sample, for which the operation needs a PRNG key.
      granularity: what is dropped: single elements (`"element"`), or whole channels
        (`"channel"`), the same ones for the whole batch; min-k ranks them by their L2
        norm over batch and positions. Fields about chunks and positions do not apply
        to channels.
      chunk_size: the number of elements in a chunk, D. Each sample (each slice along
        the leading axis) is flattened and cut into chunks of D consecutive elements,
        the last one shorter if need be, so that no chunk crosses a sample; each chunk
        selects on its own. `None` makes one chunk of the whole input.
      encoding: how the kept positions are stored: `"index"`, for each kept element an
        index of 4, 8, 16 or 32 bits, the fewest that hold D - 1; `"bitmap"`, one bit
        for each element of the input; `"auto"`, the smaller of the two.
      selection: how the largest elements of a chunk are found: `"auto"`, by the fastest
        exact method for this D, on an NVIDIA GPU a GPU kernel of this library; `"xla"`,
        without that GPU kernel; `"top_k"`, by `lax.top_k` alone. All keep the same
        elements; with `"index"` and D > 64, only `"top_k"` stores them by magnitude.
      value_dtype: the type in which kept values are stored; `None`: the activation's.
        With `"float16"`, values beyond 65504 become infinity.
        The integer types are unsigned codes, packed, with a minimum and a scale for
        every group of kept values.
      group_size: the number of kept values that share a minimum and a scale (4 bytes
        together). A group never crosses a sample, unless `chunk_size=None`.
      rounding: how a value is rounded to a code: `"nearest"`, or `"stochastic"`,
        unbiased within the group's range, for which the operation needs a PRNG key.
      fill: the value of a dropped element in the backward pass: `"zero"` (the paper),
        or `"mean"`, the mean of the dropped elements of its sample and channel, which
        is stored too.

    Raises:
      ValueError: a field's value is unknown, out of range, or without meaning together
        with another's.
      TypeError: a field's value has the wrong type.
    """

    rate: float = 0.875
    strategy: Strategy = "min_k"
    granularity: Granularity = "element"
    chunk_size: int | None = 16
    encoding: Encoding = "auto"
    selection: Selection = "auto"
    value_dtype: ValueDtype | None = None
    group_size: int = 64
    rounding: Rounding = "nearest"
    fill: Fill = "zero"

    def __post_init__(self) -> None:
        chunk_size = self.chunk_size
        if chunk_size is not None:
            chunk_size = _checked_size("chunk_size", chunk_size, " or None")
        object.__setattr__(self, "rate", _checked_rate(self.rate))
        object.__setattr__(self, "chunk_size", chunk_size)
        object.__setattr__(
            self, "group_size", _checked_size("group_size", self.group_size)
        )
        object.__setattr__(self, "value_dtype", _dtype_name(self.value_dtype))
        for field in _KNOWN:
            _check_choice(field, getattr(self, field))
        if self.granularity == "channel" and self.encoding == "bitmap":
            raise ValueError(
                "DropIT.encoding='bitmap' is for elements; with granularity='channel' "
                "the indices of the kept channels are stored: leave it at 'auto'."
            )
        if self.rounding == "stochastic" and self.code_bits is None:
            raise ValueError(
                "DropIT.rounding='stochastic' is for value_dtype 'int8', 'int4' or "
                f"'int2', got value_dtype={_written(self.value_dtype)}."
            )

    @property
    def code_bits(self) -> int | None:
        """The bits of a code of a kept value; `None` where values are floats."""
        return None if self.value_dtype is None else _CODE_BITS.get(self.value_dtype)

    @property
    def needs_key(self) -> bool:
        """Whether the stored arrays depend on a PRNG key."""
        return self.strategy == "random" or self.rounding == "stochastic"

    @property
    def per_channel(self) -> bool:
        """Whether the policy needs the axis of the channels."""
        return self.granularity == "channel" or self.fill == "mean"

    def kept(self, size: int) -> int:
        """Returns how many of the `size` elements of a selection are kept.

        `k = max(1, floor((1 - rate) · size))`: rounded down as in the paper (§3.3),
        but at least 1, or 0 of 0 elements. A product that is within 1e-6 below a whole
        number counts as that number.
        """
        return min(size, max(1, math.floor((1.0 - self.rate) * size + _ROUNDING)))


def check_policy(dropit: Any) -> None:
    """Checks that `dropit` is a policy.

    Raises:
      TypeError: `dropit` is not a `DropIT`, for example `None`.
    """
    if not isinstance(dropit, DropIT):
        raise TypeError(
            f"dropit takes a policy, such as DropIT(rate=0.875), or None for the plain "
            f"Flax layer or operation; got {_written(dropit)}."
        )


def _written(value: Any) -> str:
    """Returns the `repr` of a value; of a long `repr`, its two ends."""
    try:
        text = repr(value)
    except ValueError:  # Python limits the digits of a number
        return f"one {type(value).__name__} of very many digits"
    return text if len(text) <= 200 else f"{text[:80]}...{text[-80:]}"


def _checked_rate(rate: Any) -> float:
    if isinstance(rate, bool) or not isinstance(rate, numbers.Real):
        raise TypeError(f"DropIT.rate must be a number, got {_written(rate)}.")
    value: Any = rate  # not yet a float: `float` raises for numbers that are too large
    if not 0 <= value < 1:
        raise ValueError(
            f"DropIT.rate must be in [0, 1), got {_written(rate)}: it is the "
            "fraction of elements that is dropped."
        )
    return float(rate)


def _checked_size(field: str, size: Any, alternative: str = "") -> int:
    if isinstance(size, bool) or not isinstance(size, numbers.Integral):
        raise TypeError(
            f"DropIT.{field} must be a positive integer{alternative}, got "
            f"{_written(size)}."
        )
    if size < 1:
        raise ValueError(
            f"DropIT.{field} must be a positive integer{alternative}, got "
            f"{_written(size)}."
        )
    return int(size)


def _dtype_name(value_dtype: Any) -> Any:
    """Returns the name of a dtype such as `jnp.bfloat16`; anything else as it is."""
    if value_dtype is None or isinstance(value_dtype, str):
        return value_dtype
    try:
        return np.dtype(value_dtype).name
    except TypeError:
        return value_dtype


def _check_choice(field: str, value: Any) -> None:
    # The type first: an array would be compared element by element.
    if not isinstance(value, str | None) or value not in _KNOWN[field]:
        known = ", ".join(map(repr, _KNOWN[field]))
        raise ValueError(
            f"DropIT.{field}: unknown value {_written(value)}; known are {known}."
        )
