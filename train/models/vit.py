"""Vision transformers (Dosovitskiy et al., 2021, "An image is worth 16x16 words").

Modules and parameters have the names of Google's public Flax implementation.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from dropit_jax import Preset, preset
from dropit_jax.linen import toolbox

_Tokens = Float[Array, "batch length width"]


class MlpBlock(nn.Module):
    """Two dense layers with a GELU between them (Dosovitskiy et al., 2021, §3.1).

    Attributes:
      features: of the hidden layer.
      dtype: of the computation.
      memory: what the block caches.
    """

    features: int
    dtype: Any = None
    memory: Preset = preset("baseline")

    @nn.compact
    def __call__(self, x: _Tokens) -> _Tokens:
        """The block's output, as wide as its input."""
        tools = toolbox(self.memory)
        dense = functools.partial(
            tools.Dense,
            dtype=self.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            bias_init=nn.initializers.normal(1e-6),
        )
        hidden = tools.gelu(dense(self.features, name="Dense_0")(x))
        return dense(x.shape[-1], name="Dense_1")(hidden)


class EncoderBlock(nn.Module):
    """Attention and MLP, each after a norm and beside a shortcut (ibid., Eq. 2, 3).

    Attributes:
      num_heads: of the attention.
      mlp_features: of the MLP's hidden layer.
      dtype: of the computation.
      memory: what the block caches.
    """

    num_heads: int
    mlp_features: int
    dtype: Any = None
    memory: Preset = preset("baseline")

    @nn.compact
    def __call__(self, x: _Tokens) -> _Tokens:
        """The block's output, of the shape of its input."""
        tools = toolbox(self.memory)
        norm = functools.partial(tools.LayerNorm, dtype=self.dtype)
        y = norm(name="LayerNorm_0")(x)
        x = x + tools.MultiHeadDotProductAttention(
            num_heads=self.num_heads,
            dtype=self.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            deterministic=True,
            name="MultiHeadDotProductAttention_1",
        )(y)
        y = norm(name="LayerNorm_2")(x)
        return x + MlpBlock(
            self.mlp_features, self.dtype, self.memory, name="MlpBlock_3"
        )(y)


class Encoder(nn.Module):
    """Position embeddings, blocks, and a last norm (ibid., Eq. 1 to 4).

    Attributes:
      num_layers: how many blocks.
      num_heads: of the attention.
      mlp_features: of the MLPs' hidden layers.
      dtype: of the computation.
      memory: what the encoder caches.
    """

    num_layers: int
    num_heads: int
    mlp_features: int
    dtype: Any = None
    memory: Preset = preset("baseline")

    @nn.compact
    def __call__(self, x: _Tokens) -> _Tokens:
        """The encoded tokens."""
        tools = toolbox(self.memory)
        x = AddPositionEmbeddings(name="posembed_input")(x)
        block = tools.remat(EncoderBlock)
        for number in range(self.num_layers):
            x = block(
                num_heads=self.num_heads,
                mlp_features=self.mlp_features,
                dtype=self.dtype,
                memory=self.memory,
                name=f"encoderblock_{number}",
            )(x)
        return tools.LayerNorm(dtype=self.dtype, name="encoder_norm")(x)


class AddPositionEmbeddings(nn.Module):
    """Adds a learned vector to every position (ibid., Eq. 1)."""

    @nn.compact
    def __call__(self, x: _Tokens) -> _Tokens:
        """The tokens that know where they are."""
        shape = (1, *x.shape[1:])
        embedding = self.param("pos_embedding", nn.initializers.normal(0.02), shape)
        return x + embedding.astype(x.dtype)


class ViT(nn.Module):
    """A vision transformer that classifies by a token of its own.

    Attributes:
      num_classes: size of the output.
      patch_size: side of a patch, in pixels.
      width: of the tokens.
      num_layers: how many blocks.
      num_heads: of the attention.
      dtype: of the computation; `None`: that of image and parameters.
      memory: what the model caches. The embedding of the patches is left as it is: its
        input is the image itself (DropIT paper, §3.4).
    """

    num_classes: int
    patch_size: int = 16
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    dtype: Any = None
    memory: Preset = preset("baseline")

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool
    ) -> Float[Array, "batch classes"]:
        """The logits of a batch of images; it is the same in training."""
        del train
        x = nn.Conv(
            self.width,
            (self.patch_size, self.patch_size),
            strides=(self.patch_size, self.patch_size),
            padding="VALID",
            dtype=self.dtype,
            name="embedding",
        )(x)
        x = x.reshape(x.shape[0], -1, self.width)
        token = self.param("cls", nn.initializers.zeros, (1, 1, self.width))
        token = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, self.width))
        x = jnp.concatenate([token, x], axis=1)
        x = Encoder(
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            mlp_features=4 * self.width,
            dtype=self.dtype,
            memory=self.memory,
            name="Transformer",
        )(x)
        head = toolbox(self.memory).Dense(
            self.num_classes, kernel_init=nn.initializers.zeros, name="head"
        )
        return head(x[:, 0].astype(jnp.float32))
