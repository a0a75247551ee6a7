"""The arrays of a file by name, before they are a model's."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An array of a file, of which the values are not read yet.

    Attributes:
      source: its name in the file.
      like: zeros of its shape and dtype, which take the memory of one.
      read: reads its values.
    """

    source: str
    like: np.ndarray
    read: Callable[[], np.ndarray]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        return self.like.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the values."""
        return self.like.dtype

    def map(self, change: Callable[[np.ndarray], np.ndarray]) -> "Tensor":
        """The tensor in another layout; `change` takes an array and gives a view."""
        return Tensor(self.source, change(self.like), lambda: change(self.read()))


def zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros that take the memory of one.

    Raises:
      ValueError: no array can have that shape.
    """
    return np.broadcast_to(np.zeros((), dtype), shape)


# By the name of the variable in this program's models: its path, joined by "/". In the
# model, and in the file, scanned blocks are as if each were its own (`layers`).
Tensors = dict[str, Tensor]
Specs = dict[str, jax.ShapeDtypeStruct]

HEAD = ("params/head/kernel", "params/head/bias")
CLS = "params/cls"
POSITIONS = "params/Transformer/posembed_input/pos_embedding"
