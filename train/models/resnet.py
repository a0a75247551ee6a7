"""Residual networks.

He et al., 2016, "Deep residual learning for image recognition".
"""

from typing import Any, ClassVar, Literal, get_args

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from train.models.checks import check_choice
from train.models.layers import FLAX, Layers, Remat, remat

Stem = Literal["cifar", "imagenet"]
STEMS: tuple[Stem, ...] = get_args(Stem)

_kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class ResidualBlock(nn.Module):
    """What the blocks share: their fields, layers and shortcut.

    Attributes:
      features: channels of the 3x3 convolutions.
      strides: stride of the first of them; the shortcut follows it with a 1x1
        convolution where the shape changes.
      dtype: of the computation.
      layers: the layers that the block is built of.
    """

    features: int
    strides: int = 1
    dtype: Any = None
    layers: Layers = FLAX

    # Channels of the output, in those of the 3x3 convolutions.
    expansion: ClassVar[int] = 1

    def _conv(self, features: int, size: int, name: str, strides: int = 1) -> nn.Module:
        return self.layers.conv(
            features,
            (size, size),
            strides,
            padding=size // 2,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=_kernel_init,
            name=name,
        )

    def _norm(self, name: str, train: bool) -> nn.Module:
        return _batch_norm(self.dtype, name, train)

    def _shortcut(self, x: Array, train: bool) -> Array:
        features = self.expansion * self.features
        if x.shape[-1] == features and self.strides == 1:
            return x
        x = self._conv(features, 1, "shortcut_conv", self.strides)(x)
        return self._norm("shortcut_norm", train)(x)


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions and a shortcut (He et al., 2016, Figure 2).

    Attributes:
      features: as in `ResidualBlock`, like all others.
    """

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width in"], train: bool
    ) -> Float[Array, "batch height_out width_out out"]:
        """The block's output; `train` normalises by the batch's own statistics."""
        relu = self.layers.relu
        shortcut = self._shortcut(x, train)
        y = self._conv(self.features, 3, "conv1", self.strides)(x)
        y = relu(self._norm("norm1", train)(y))
        y = self._conv(self.features, 3, "conv2")(y)
        y = self._norm("norm2", train)(y)
        return relu(y + shortcut)


class BottleneckBlock(ResidualBlock):
    """A 3x3 convolution between two 1x1, and a shortcut (ibid., Figure 5, right).

    The stride is that of the 3x3 convolution, as in torchvision, and not of the first,
    as in the paper.

    Attributes:
      features: as in `ResidualBlock`, like all others.
    """

    expansion: ClassVar[int] = 4

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width in"], train: bool
    ) -> Float[Array, "batch height_out width_out out"]:
        """The block's output; `train` normalises by the batch's own statistics."""
        relu = self.layers.relu
        shortcut = self._shortcut(x, train)
        y = self._conv(self.features, 1, "conv1")(x)
        y = relu(self._norm("norm1", train)(y))
        y = self._conv(self.features, 3, "conv2", self.strides)(y)
        y = relu(self._norm("norm2", train)(y))
        y = self._conv(self.expansion * self.features, 1, "conv3")(y)
        y = self._norm("norm3", train)(y)
        return relu(y + shortcut)


class ResNet(nn.Module):
    """A residual network (ibid., Table 1).

    Attributes:
      num_classes: size of the output.
      stage_sizes: blocks in each stage.
      width: features of the first stage's blocks; every further stage doubles them.
      stem: `"cifar"`, one 3x3 convolution, for small images; `"imagenet"`, a 7x7
        convolution of stride 2 and a max-pool of stride 2.
      block: `BasicBlock` or `BottleneckBlock`.
      dtype: of the computation; `None`: that of image and parameters. Parameters,
        running statistics and logits are float32.
      layers: the layers that the model is built of. The first convolution is Flax's:
        its input is the image itself (DropIT paper, §3.4).
      remat: the blocks, and the stem, that are recomputed: as in `layers.remat`.
    """

    num_classes: int
    stage_sizes: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64
    stem: Stem = "cifar"
    block: type[ResidualBlock] = BasicBlock
    dtype: Any = None
    layers: Layers = FLAX
    remat: Remat = "none"

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool
    ) -> Float[Array, "batch classes"]:
        """The logits of a batch of images.

        Raises:
          ValueError: there is no such stem.
        """
        check_choice("ResNet.stem", self.stem, STEMS)
        stem = remat(ResNet._stem, "blocks" if self.remat == "blocks" else "none")
        x = stem(self, x, train)
        block = remat(self.block, self.remat)
        for stage, blocks in enumerate(self.stage_sizes):
            for number in range(blocks):
                x = block(
                    features=self.width * 2**stage,
                    strides=2 if stage > 0 and number == 0 else 1,
                    dtype=self.dtype,
                    layers=self.layers,
                    name=f"stage{stage + 1}_block{number + 1}",
                )(x, train)
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        return self.layers.head(self.num_classes, name="head")(x)

    def _stem(self, x: Array, train: bool) -> Array:
        size, strides = {"cifar": (3, 1), "imagenet": (7, 2)}[self.stem]
        x = nn.Conv(
            self.width,
            (size, size),
            strides,
            padding=size // 2,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=_kernel_init,
            name="stem_conv",
        )(x)
        x = self.layers.relu(_batch_norm(self.dtype, "stem_norm", train)(x))
        if self.stem == "cifar":
            return x
        return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


def _batch_norm(dtype: Any, name: str, train: bool) -> nn.Module:
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        dtype=dtype,
        name=name,
    )
