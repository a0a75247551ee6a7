"""An array in 8 bits an element, as what a backward pass reads.

Codes have a minimum and a scale for every 64 elements (`storage.quantization`): 8.5
bits an element. Each element is off by at most half a step of its code,

    δ = (range + 0.8 % of |minimum|) / 506,    of the 64 elements that share a scale.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dropit_jax.storage.quantization import Quantized, quantize
from dropit_jax.xla import layouts, shardings

# Elements that share a minimum and a scale.
_GROUP_SIZE = 64


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes",),
    meta_fields=("dtype", "spec", "group"),
)
@dataclasses.dataclass(frozen=True)
class EightBits:
    """An array in 8 bits.

    Attributes:
      codes: of the array.
      dtype: of the array.
      spec: its explicit sharding.
      group: what is sharded like it.
    """

    codes: Quantized
    dtype: Any
    spec: shardings.Spec
    group: int


def store(
    x: Float[Array, "*shape"], name: str
) -> tuple[Float[Array, "*shape"], EightBits]:
    """The array to go on with, and what is cached of it.

    Args:
      x: an array.
      name: of what is cached, for `jax.checkpoint_policies` and reports.
    """
    group = shardings.new_group()
    x = shardings.join(x, group)
    codes = checkpoint_name(quantize(layouts.of_tokens(x), 8, _GROUP_SIZE), name)
    return x, EightBits(codes, x.dtype, shardings.spec(x), group)


def load(stored: EightBits) -> Float[Array, "*shape"]:
    """The array that was stored, as near as 8 bits have it."""
    x = layouts.of_tokens(stored.codes.dequantize(stored.dtype))
    return shardings.join(shardings.to(x, stored.spec), stored.group)
