"""A model for benchmarks only; the other models are in `train.models`."""

import flax.linen as nn
from jaxtyping import Array, Float

from train.models.layers import FLAX, Layers, Remat, remat


class HiddenLayer(nn.Module):
    """A dense layer and a ReLU, the block of an `MLP`.

    Attributes:
      features: the features of the output.
      reads_image: whether the input is the image. The dense layer is then Flax's
        (DropIT paper, §3.4).
      layers: the layers of which the block is built.
    """

    features: int
    reads_image: bool = False
    layers: Layers = FLAX

    @nn.compact
    def __call__(self, x: Float[Array, "batch in"]) -> Float[Array, "batch features"]:
        """Returns the block's output: `(batch, in) -> (batch, features)`."""
        dense = nn.Dense if self.reads_image else self.layers.dense
        return self.layers.relu(dense(self.features, name="dense")(x))


class MLP(nn.Module):
    """A multilayer perceptron that classifies images.

    Attributes:
      num_classes: the number of classes.
      depth: the number of hidden layers.
      width: the features of a hidden layer.
      layers: the layers of which the model is built.
      remat: the parts of hidden layers that are recomputed: as in `layers.remat`.
    """

    num_classes: int
    depth: int = 4
    width: int = 1024
    layers: Layers = FLAX
    remat: Remat = "none"

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool
    ) -> Float[Array, "batch classes"]:
        """Returns the logits of a batch of images; `train` makes no difference."""
        del train
        block = remat(HiddenLayer, self.remat, static_argnums=())
        x = x.reshape(x.shape[0], -1)
        for number in range(self.depth):
            x = block(
                self.width, number == 0, layers=self.layers, name=f"hidden{number + 1}"
            )(x)
        return self.layers.head(self.num_classes, name="head")(x)
