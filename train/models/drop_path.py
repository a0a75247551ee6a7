"""Stochastic depth (Huang et al., 2016, "Deep networks with stochastic depth")."""

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float


def linear_rates(rate: float, num_layers: int) -> Float[np.ndarray, "layers"]:
    """Returns the rates of layers, in equal steps from 0 to `rate` (ibid., §3).

    For `rate=0.2` and three layers: `[0, 0.1, 0.2]`. The first rate is 0, as in timm,
    and not one step above 0, as in the paper. A single layer has the rate 0.
    """
    return np.linspace(0, rate, num_layers, dtype=np.float32)


class DropPath(nn.Module):
    """Drops the residual branch of random samples of a batch (ibid., §3).

    In training the branches of the other samples are scaled, as in dropout. The rate is
    an argument, not a field, so that each layer in an `nn.scan` can have its own rate.
    """

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch *shape"],
        rate: Float[Array | np.ndarray, ""] | None,
        train: bool,
    ) -> Float[Array, "batch *shape"]:
        """Returns the branch, in training with random samples set to 0.

        Args:
          x: the branch.
          rate: the probability that a sample is dropped, below 1; `None`: the branch is
            returned unchanged, and no random number is drawn.
          train: whether to drop samples.
        """
        if rate is None or not train:
            return x
        keep = 1 - rate
        shape = (x.shape[0], *[1] * (x.ndim - 1))
        kept = jax.random.bernoulli(self.make_rng("dropout"), keep, shape)
        # The residual is one number for each sample.
        scale = jax.lax.stop_gradient(kept / keep)
        return x * scale.astype(x.dtype)
