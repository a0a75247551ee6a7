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
    """The base class of residual blocks, with their fields, layers and shortcut.

    If the shape changes, the shortcut is a 1x1 convolution with the same stride, and a
    batch norm. With `features=128` and `strides=2`, a `BasicBlock` maps
    `(batch, 32, 32, 64)` to `(batch, 16, 16, 128)`.

    Attributes:
      features: the channels of the 3x3 convolutions.
      strides: the stride of the first 3x3 convolution.
      dtype: the dtype of the computation.
      layers: the layers of which the block is built.
    """

    features: int
    strides: int = 1
    dtype: Any = None
    layers: Layers = FLAX

    # The ratio of the output's channels to the channels of the 3x3 convolutions.
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
      features: as in `ResidualBlock`, like all other attributes.
    """

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width in"], train: bool
    ) -> Float[Array, "batch height_out width_out out"]:
        """Returns the block's output; with `train`, batch norms use the batch."""
        relu = self.layers.relu
        shortcut = self._shortcut(x, train)
        y = self._conv(self.features, 3, "conv1", self.strides)(x)
        y = relu(self._norm("norm1", train)(y))
        y = self._conv(self.features, 3, "conv2")(y)
        y = self._norm("norm2", train)(y)
        return relu(y + shortcut)


class BottleneckBlock(ResidualBlock):
    """A 3x3 convolution between two 1x1, and a shortcut (ibid., Figure 5, right).

    The 3x3 convolution has the stride, as in torchvision; in the paper, the first
    convolution has it.

    Attributes:
      features: as in `ResidualBlock`, like all other attributes.
    """

    expansion: ClassVar[int] = 4

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width in"], train: bool
    ) -> Float[Array, "batch height_out width_out out"]:
        """Returns the block's output; with `train`, batch norms use the batch."""
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
      num_classes: the number of classes.
      stage_sizes: the number of blocks in each stage.
      width: the features of the first stage's blocks; each later stage doubles them.
      stem: `"cifar"`, one 3x3 convolution, for small images; `"imagenet"`, a 7x7
        convolution of stride 2 and a max-pool of stride 2.
      block: `BasicBlock` or `BottleneckBlock`.
      dtype: the dtype of the computation; `None`: the dtype of images and parameters.
        Parameters, running statistics and logits are float32.
      layers: the layers of which the model is built. The first convolution is always
        Flax's, since its input is the image (DropIT paper, §3.4).
      remat: the recomputed blocks, as in `layers.remat`; "blocks" includes the stem.
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
        """Returns the logits of a batch of images.

        Raises:
          ValueError: the stem is unknown.
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
