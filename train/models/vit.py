"""Vision transformers (Dosovitskiy et al., 2021, "An image is worth 16x16 words").

Modules and parameters have the names of Google's public Flax implementation.
"""

from typing import Any, Literal, get_args

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from train.models.checks import check_choice, check_rate
from train.models.encoder import Encoder
from train.models.layers import FLAX, Layers, Remat
from train.models.positions import POSITIONS, Positions

Pool = Literal["cls", "gap"]
POOLS: tuple[Pool, ...] = get_args(Pool)


class ViT(nn.Module):
    """A vision transformer that classifies.

    With `train`, dropout and stochastic depth take their random numbers from the stream
    `"dropout"`; where both rates are 0 it is the same in training.

    Attributes:
      num_classes: size of the output.
      patch_size: side of a patch, in pixels.
      width: of the tokens.
      num_layers: how many blocks.
      num_heads: of the attention.
      pool: what the logits are read from: `"cls"`, a token of its own; `"gap"`, the
        mean over all tokens (Dosovitskiy et al., 2021, App. D.3), with no such token.
      positions: how tokens are told where they are: `"learned"`, by a parameter;
        `"sincos"`, by sines and cosines of row and column.
      dropout: rate (ibid., App. B.1).
      drop_path: rate of stochastic depth in the last block, which grows to that from 0
        in the first (Touvron et al., 2021, Table 9).
      scan: whether the blocks are one in a loop of the compiled program, which then
        takes as long to compile for any depth. Their parameters are stacked along a
        first axis. So is all that a block caches, of which XLA then recomputes nothing
        by itself: it is meant to go with `remat="blocks"`.
      dtype: of the computation; `None`: that of image and parameters.
      layers: the layers that the model is built of. The embedding of the patches is
        Flax's: its input is the image itself (DropIT paper, §3.4).
      remat: the blocks that are recomputed: as in `layers.remat`.
    """

    num_classes: int
    patch_size: int = 16
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    pool: Pool = "cls"
    positions: Positions = "learned"
    dropout: float = 0.0
    drop_path: float = 0.0
    scan: bool = False
    dtype: Any = None
    layers: Layers = FLAX
    remat: Remat = "none"

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool
    ) -> Float[Array, "batch classes"]:
        """The logits of a batch of images.

        Raises:
          ValueError: a field has a value that it cannot have, or one that does not fit
            the size of the images.
        """
        self._check(x)
        x = self._patches(x)
        _, rows, columns, _ = x.shape
        x = x.reshape(x.shape[0], -1, self.width)
        if self.pool == "cls":
            token = self.param("cls", nn.initializers.zeros, (1, 1, self.width))
            token = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, self.width))
            x = jnp.concatenate([token, x], axis=1)
        x = Encoder(
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            mlp_features=4 * self.width,
            grid=(rows, columns),
            positions=self.positions,
            dropout=self.dropout,
            drop_path=self.drop_path,
            scan=self.scan,
            dtype=self.dtype,
            layers=self.layers,
            remat=self.remat,
            name="Transformer",
        )(x, train)
        x = x[:, 0] if self.pool == "cls" else jnp.mean(x, axis=1, dtype=jnp.float32)
        head = self.layers.head(
            self.num_classes, kernel_init=nn.initializers.zeros, name="head"
        )
        return head(x.astype(jnp.float32))

    def _patches(self, x: Array) -> Float[Array, "batch rows columns width"]:
        patch = (self.patch_size, self.patch_size)
        return nn.Conv(
            self.width,
            patch,
            strides=patch,
            padding="VALID",
            dtype=self.dtype,
            name="embedding",
        )(x)

    def _check(self, x: Array) -> None:
        check_choice("ViT.pool", self.pool, POOLS)
        check_choice("ViT.positions", self.positions, POSITIONS)
        check_rate("ViT.dropout", self.dropout)
        check_rate("ViT.drop_path", self.drop_path)
        _, height, width, _ = x.shape
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"ViT.patch_size: {self.patch_size} does not divide the image size, "
                f"{height}x{width}."
            )
        if self.positions == "sincos" and self.width % 4:
            raise ValueError(
                f'ViT.width: must be a multiple of 4 for positions="sincos", got '
                f"{self.width}."
            )
