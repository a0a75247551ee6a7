"""ResNet-18 (He et al., 2016, "Deep residual learning for image recognition")."""

import functools
from typing import Literal, get_args

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from dropit_jax import Preset, preset
from dropit_jax.linen import toolbox

Stem = Literal["cifar", "imagenet"]
STEMS: tuple[Stem, ...] = get_args(Stem)

_kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., 2016, Figure 2).

    Attributes:
      features: channels of the output.
      strides: stride of the first convolution; the shortcut follows it with a 1x1
        convolution where the shape changes.
      memory: what the block caches.
    """

    features: int
    strides: int = 1
    memory: Preset = preset("baseline")

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width in"], train: bool
    ) -> Float[Array, "batch height_out width_out out"]:
        """The block's output; `train` normalises by the batch's own statistics."""
        tools = toolbox(self.memory)
        conv = functools.partial(tools.Conv, use_bias=False, kernel_init=_kernel_init)
        norm = functools.partial(
            tools.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5
        )

        shortcut = x
        if x.shape[-1] != self.features or self.strides != 1:
            shortcut = conv(
                self.features, (1, 1), self.strides, padding=0, name="shortcut_conv"
            )(x)
            shortcut = norm(name="shortcut_norm")(shortcut)

        y = conv(self.features, (3, 3), self.strides, padding=1, name="conv1")(x)
        y = tools.relu(norm(name="norm1")(y))
        y = conv(self.features, (3, 3), padding=1, name="conv2")(y)
        y = norm(name="norm2")(y)
        return tools.relu(y + shortcut)


class ResNet(nn.Module):
    """A residual network of basic blocks.

    Attributes:
      num_classes: size of the output.
      stage_sizes: blocks in each stage.
      width: channels of the first stage; every further stage doubles them.
      stem: `"cifar"`, one 3x3 convolution, for small images; `"imagenet"`, a 7x7
        convolution of stride 2 and a max-pool of stride 2.
      memory: what the model caches. The first convolution is left as it is: its input
        is the image itself (DropIT paper, §3.4).
    """

    num_classes: int
    stage_sizes: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64
    stem: Stem = "cifar"
    memory: Preset = preset("baseline")

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool
    ) -> Float[Array, "batch classes"]:
        """The logits of a batch of images."""
        tools, stem = toolbox(self.memory), ResNet._stem
        if self.memory.remat == "blocks":
            stem = nn.remat(stem, static_argnums=(2,))
        x = stem(self, x, train)
        block = tools.remat(BasicBlock, static_argnums=(2,))
        for stage, blocks in enumerate(self.stage_sizes):
            for number in range(blocks):
                x = block(
                    features=self.width * 2**stage,
                    strides=2 if stage > 0 and number == 0 else 1,
                    memory=self.memory,
                    name=f"stage{stage + 1}_block{number + 1}",
                )(x, train)
        x = jnp.mean(x, axis=(1, 2))
        return tools.Dense(self.num_classes, name="head")(x)

    def _stem(self, x: Array, train: bool) -> Array:
        tools = toolbox(self.memory)
        size, strides = {"cifar": (3, 1), "imagenet": (7, 2)}[self.stem]
        x = nn.Conv(
            self.width,
            (size, size),
            strides,
            padding=size // 2,
            use_bias=False,
            kernel_init=_kernel_init,
            name="stem_conv",
        )(x)
        norm = tools.BatchNorm(
            use_running_average=not train, momentum=0.9, epsilon=1e-5, name="stem_norm"
        )
        x = tools.relu(norm(x))
        if self.stem == "cifar":
            return x
        return tools.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
