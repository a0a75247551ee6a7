"""Position embeddings for the tokens of an image."""

from typing import Literal, get_args

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from train.models.checks import check_choice

Positions = Literal["learned", "sincos"]
POSITIONS: tuple[Positions, ...] = get_args(Positions)

_LONGEST_PERIOD = 10_000.0


def sincos_2d(
    height: int, width: int, features: int
) -> Float[np.ndarray, "height*width features"]:
    """Returns sines and cosines of the column and row of each place of a grid.

    For a grid of 2 x 3 and 8 features, the shape is (6, 8). The first half of the
    features is for the column, the second half for the row, as in MoCo v3 (Chen et al.,
    2021, "An empirical study of training self-supervised vision transformers", §5). The
    frequencies are a geometric sequence from 1 to 1 / 10,000, as in big_vision's
    `posemb_sincos_2d` (Beyer et al., 2022, "Better plain ViT baselines for
    ImageNet-1k").

    Args:
      height: the number of rows of the grid.
      width: the number of columns of the grid.
      features: the features of the result, a multiple of 4.

    Raises:
      ValueError: `features` is no multiple of 4.
    """
    if features % 4:
        raise ValueError(
            f'positions "sincos" take a width that is a multiple of 4, got {features}.'
        )
    frequencies = _LONGEST_PERIOD ** -np.linspace(0, 1, features // 4)
    row, column = (place.reshape(-1, 1) for place in np.mgrid[:height, :width])
    angles = column * frequencies, row * frequencies
    waves = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    return np.concatenate(waves, axis=1)


class AddPositionEmbeddings(nn.Module):
    """Adds to every token a vector for its position (Dosovitskiy et al., 2021, Eq. 1).

    Attributes:
      grid: the numbers of rows and columns of patches, which are the last tokens.
      positions: the vectors: `"learned"`, a parameter; `"sincos"`, `sincos_2d`, and 0
        for tokens before the patches.
    """

    grid: tuple[int, int]
    positions: Positions = "learned"

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length width"]
    ) -> Float[Array, "batch length width"]:
        """Returns the tokens plus their position embeddings."""
        check_choice("positions", self.positions, POSITIONS)
        _, length, width = x.shape
        if self.positions == "learned":
            shape = (1, length, width)
            embedding = self.param("pos_embedding", nn.initializers.normal(0.02), shape)
            return x + embedding.astype(x.dtype)
        fixed = sincos_2d(*self.grid, width)
        fixed = np.pad(fixed, ((length - len(fixed), 0), (0, 0)))
        return x + jnp.asarray(fixed, x.dtype)
