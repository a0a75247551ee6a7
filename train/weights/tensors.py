"""The arrays of a file, of which only names, shapes and dtypes are read yet."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array of a file whose values are read on request.

    Attributes:
      source: name of the array in the file.
      like: zeros of the array's shape and dtype, in the memory of one element.
      read: reads the values.
    """

    source: str
    like: np.ndarray
    read: Callable[[], np.ndarray]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return self.like.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the array."""
        return self.like.dtype

    def map(self, change: Callable[[np.ndarray], np.ndarray]) -> "LazyArray":
        """Returns the array in another layout; `change` maps an array to a view of it.

        Reads no values yet.
        """
        return LazyArray(self.source, change(self.like), lambda: change(self.read()))


def zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Returns a read-only array of zeros, which takes the memory of one element.

    Raises:
      ValueError: no array can have the shape.
    """
    return np.broadcast_to(np.zeros((), dtype), shape)


# The keys are the names of variables in this program's models: paths, joined by "/".
# Stacked parameters of scanned blocks are unstacked (see `layers`).
Tensors = dict[str, LazyArray]
Specs = dict[str, jax.ShapeDtypeStruct]

HEAD = ("params/head/kernel", "params/head/bias")
CLS = "params/cls"
POSITIONS = "params/Transformer/posembed_input/pos_embedding"
