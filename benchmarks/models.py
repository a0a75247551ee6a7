"""A model that is only measured; the others are those of `train.models`."""

import flax.linen as nn
from jaxtyping import Array, Float

from dropit_jax import LayerPreset, layer_preset
from dropit_jax.linen import toolbox


class HiddenLayer(nn.Module):
    """A dense layer and a ReLU: what `remat` takes as a block.

    Attributes:
      features: of the output.
      reads_image: whether the input is the image itself, which is there anyway and is
        left as it is (DropIT paper, §3.4).
      memory: what the layer caches.
    """

    features: int
    reads_image: bool = False
    memory: LayerPreset = layer_preset("baseline")

    @nn.compact
    def __call__(self, x: Float[Array, "batch in"]) -> Float[Array, "batch features"]:
        """The layer's output."""
        tools = toolbox(self.memory)
        dense = nn.Dense if self.reads_image else tools.Dense
        return tools.relu(dense(self.features, name="dense")(x))


class MLP(nn.Module):
    """A multilayer perceptron that classifies images.

    Attributes:
      num_classes: size of the output.
      layers: hidden layers.
      width: features of each of them.
      memory: what the model caches.
    """

    num_classes: int
    layers: int = 4
    width: int = 1024
    memory: LayerPreset = layer_preset("baseline")

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool
    ) -> Float[Array, "batch classes"]:
        """The logits of a batch of images; `train` makes no difference."""
        del train
        tools = toolbox(self.memory)
        layer = tools.remat(HiddenLayer)
        x = x.reshape(x.shape[0], -1)
        for number in range(self.layers):
            x = layer(
                self.width, number == 0, memory=self.memory, name=f"hidden{number + 1}"
            )(x)
        return tools.Dense(self.num_classes, name="head")(x)
