"""What a file's arrays are called until they are a model's."""

import dataclasses

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An array of a file.

    Attributes:
      source: its name in the file.
      array: its values, in the layout of this program's models.
    """

    source: str
    array: np.ndarray


# By the name of the variable in this program's models: its path, joined by "/". In the
# model, and in the file, scanned blocks are as if each were its own (`layers`).
Tensors = dict[str, Tensor]
Specs = dict[str, jax.ShapeDtypeStruct]

HEAD = ("params/head/kernel", "params/head/bias")
CLS = "params/cls"
POSITIONS = "params/Transformer/posembed_input/pos_embedding"
