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
    """A vision transformer that classifies images.

    With `train`, dropout and stochastic depth draw random numbers from the stream
    `"dropout"`; if both rates are 0, `train` makes no difference.

    Attributes:
      num_classes: the number of classes.
      patch_size: the side of a patch, in pixels.
      width: the features of a token.
      num_layers: the number of blocks.
      num_heads: the number of attention heads.
      pool: the input of the head: `"cls"`, an additional token; `"gap"`, the mean over
        all tokens (Dosovitskiy et al., 2021, App. D.3), without an additional token.
      positions: the position embeddings: `"learned"`, a parameter; `"sincos"`, sines
        and cosines of row and column.
      dropout: the dropout rate (ibid., App. B.1).
      drop_path: the rate of stochastic depth in the last block; it grows linearly from
        0 in the first block (Touvron et al., 2021, Table 9).
      scan: whether a loop of the compiled program runs one block for all layers. The
        time to compile then does not depend on the depth. Parameters and residuals of
        the blocks are stacked along a new first axis. XLA does not recompute stacked
        residuals by itself: use it with `remat="blocks"`.
      dtype: the dtype of the computation; `None`: the dtype of images and parameters.
      layers: the layers of which the model is built. The patch embedding is always
        Flax's, since its input is the image (DropIT paper, §3.4).
      remat: the recomputed blocks, as in `layers.remat`.
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
        """Returns the logits of a batch of images.

        Raises:
          ValueError: the value of a field is invalid, or does not fit the size of the
            images.
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
