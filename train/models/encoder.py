"""The encoder of a vision transformer (Dosovitskiy et al., 2021, §3.1).

Modules and parameters have the names of Google's public Flax implementation, and
dropout is in the same places.
"""

import functools
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from train.models.drop_path import DropPath, linear_rates
from train.models.layers import FLAX, Layers, Remat, remat
from train.models.positions import AddPositionEmbeddings, Positions

_Tokens = Float[Array, "batch length width"]


class MlpBlock(nn.Module):
    """Two dense layers with a GELU between them (Dosovitskiy et al., 2021, §3.1).

    Attributes:
      features: the features of the hidden layer.
      dropout: the dropout rate after each of the layers.
      dtype: the dtype of the computation.
      layers: the layers of which the block is built.
    """

    features: int
    dropout: float = 0.0
    dtype: Any = None
    layers: Layers = FLAX

    @nn.compact
    def __call__(self, x: _Tokens, train: bool) -> _Tokens:
        """Returns the block's output, in the shape of its input."""
        dense = functools.partial(
            self.layers.dense,
            dtype=self.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            bias_init=nn.initializers.normal(1e-6),
        )
        dropout = functools.partial(nn.Dropout, self.dropout, deterministic=not train)
        hidden = dropout()(nn.gelu(dense(self.features, name="Dense_0")(x)))
        return dropout()(dense(x.shape[-1], name="Dense_1")(hidden))


class EncoderBlock(nn.Module):
    """A pre-norm block: attention, then an MLP (Dosovitskiy et al., 2021, Eq. 2, 3).

    Attributes:
      num_heads: the number of attention heads.
      mlp_features: the features of the MLP's hidden layer.
      dropout: the dropout rate after the attention and in the MLP.
      dtype: the dtype of the computation.
      layers: the layers of which the block is built.
    """

    num_heads: int
    mlp_features: int
    dropout: float = 0.0
    dtype: Any = None
    layers: Layers = FLAX

    @nn.compact
    def __call__(
        self, x: _Tokens, train: bool, drop_path: Float[Array, ""] | None = None
    ) -> _Tokens:
        """Returns the block's output, in the shape of its input.

        Args:
          x: the tokens.
          train: whether dropout and stochastic depth are applied.
          drop_path: the rate at which each of the two branches is dropped; `None`: 0.
        """
        norm = functools.partial(nn.LayerNorm, dtype=self.dtype)
        y = norm(name="LayerNorm_0")(x)
        y = self.layers.attention(
            num_heads=self.num_heads,
            dtype=self.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            deterministic=True,
            name="MultiHeadDotProductAttention_1",
        )(y)
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        x = x + DropPath()(y, drop_path, train)
        y = norm(name="LayerNorm_2")(x)
        y = MlpBlock(
            self.mlp_features, self.dropout, self.dtype, self.layers, name="MlpBlock_3"
        )(y, train)
        return x + DropPath()(y, drop_path, train)


class Encoder(nn.Module):
    """Position embeddings, blocks and a norm (Dosovitskiy et al., 2021, Eq. 1 to 4).

    Attributes:
      num_layers: the number of blocks.
      num_heads: the number of attention heads.
      mlp_features: the features of the MLPs' hidden layers.
      grid: the numbers of rows and columns of patches.
      positions: as in `AddPositionEmbeddings`.
      dropout: the dropout rate after the position embeddings and in the blocks.
      drop_path: the rate at which the last block's branches are dropped; it grows
        linearly from 0 in the first block. A single block has the rate 0.
      scan: whether a loop of the compiled program runs one block, `encoderblock`, for
        all layers. The parameters are stacked along a new first axis: a kernel has the
        shape `(num_layers, in, out)`.
      dtype: the dtype of the computation.
      layers: the layers of which the encoder is built.
      remat: the recomputed blocks, as in `layers.remat`.
    """

    num_layers: int
    num_heads: int
    mlp_features: int
    grid: tuple[int, int]
    positions: Positions = "learned"
    dropout: float = 0.0
    drop_path: float = 0.0
    scan: bool = False
    dtype: Any = None
    layers: Layers = FLAX
    remat: Remat = "none"

    @nn.compact
    def __call__(self, x: _Tokens, train: bool) -> _Tokens:
        """Returns the encoded tokens, in the shape of `x`."""
        x = AddPositionEmbeddings(self.grid, self.positions, name="posembed_input")(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = self._scanned(x, train) if self.scan else self._looped(x, train)
        return nn.LayerNorm(dtype=self.dtype, name="encoder_norm")(x)

    def _looped(self, x: _Tokens, train: bool) -> _Tokens:
        rates = self._rates()
        for number in range(self.num_layers):
            rate = None if rates is None else rates[number]
            x = self._block(f"encoderblock_{number}")(x, train, rate)
        return x

    def _scanned(self, x: _Tokens, train: bool) -> _Tokens:
        def body(block: nn.Module, x: _Tokens, rate: Any) -> tuple[_Tokens, None]:
            return block(x, train, rate), None

        scan = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True, "dropit": True},
            length=self.num_layers,
        )
        x, _ = scan(self._block("encoderblock"), x, self._rates())
        return x

    def _rates(self) -> Float[Any, "layers"] | None:
        if self.drop_path == 0:
            return None
        return linear_rates(self.drop_path, self.num_layers)

    def _block(self, name: str) -> nn.Module:
        return remat(EncoderBlock, self.remat)(
            num_heads=self.num_heads,
            mlp_features=self.mlp_features,
            dropout=self.dropout,
            dtype=self.dtype,
            layers=self.layers,
            name=name,
        )
