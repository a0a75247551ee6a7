"""Interpolation of position embeddings to another grid."""

import math

import numpy as np
import scipy.ndimage
from jaxtyping import Float


def resize(
    embeddings: Float[np.ndarray, "1 length width"], length: int, tokens: int
) -> Float[np.ndarray, "1 new_length width"]:
    """Interpolates position embeddings bilinearly to another grid.

    With a class token, from 3 x 3 to 4 x 4: `(1, 1 + 9, width) -> (1, 1 + 16, width)`.
    As `interpolate_posembed` in vit_jax/checkpoint.py of Google's public implementation
    (Dosovitskiy et al., 2021, §3.2): the corners of the two grids coincide.

    Args:
      embeddings: embeddings of the tokens, then of a square grid.
      length: number of embeddings to return, those of the tokens included.
      tokens: number of tokens before the grid; their embeddings stay as they are.

    Returns:
      The embeddings in float64.

    Raises:
      ValueError: one of the grids is not square: see `are_square`.
    """
    first, grid = np.split(np.asarray(embeddings[0], np.float64), [tokens])
    if not are_square(len(grid), length - tokens):
        raise ValueError(f"{len(grid)} or {length - tokens} is no square.")
    old, new = math.isqrt(len(grid)), math.isqrt(length - tokens)
    square = grid.reshape(old, old, -1)
    # In SciPy's default mode, the last row is 0 where rounding puts it outside of the
    # grid, as from 24 rows to 22.
    zoom = (new / old, new / old, 1)
    square = scipy.ndimage.zoom(square, zoom, order=1, mode="nearest")
    return np.concatenate([first, square.reshape(new**2, -1)])[None]


def are_square(*lengths: int) -> bool:
    """Returns whether every length is the number of positions of a square grid."""
    return all(n > 0 and math.isqrt(n) ** 2 == n for n in lengths)
