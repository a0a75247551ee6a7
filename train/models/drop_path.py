"""Stochastic depth (Huang et al., 2016, "Deep networks with stochastic depth")."""

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float


def linear_rates(rate: float, num_layers: int) -> Float[np.ndarray, "layers"]:
    """Rates from 0 in the first layer to `rate` in the last (ibid., §3).

    The first layer's is 0, as in timm; in the paper it is one step above. A layer that
    is the only one is never dropped.
    """
    return np.linspace(0, rate, num_layers, dtype=np.float32)


class DropPath(nn.Module):
    """Drops a residual branch of whole samples at random (ibid., §3).

    What stays is scaled in training, as in dropout, and nothing in evaluation.
    The rate is an argument and no field, so that `nn.scan` can give each layer its own.
    """

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch *shape"],
        rate: Float[Array | np.ndarray, ""] | None,
        train: bool,
    ) -> Float[Array, "batch *shape"]:
        """The branch with some samples 0.

        Args:
          x: the branch.
          rate: of the samples to drop, less than 1; `None`: nothing is random.
          train: whether to drop any.
        """
        if rate is None or not train:
            return x
        keep = 1 - rate
        shape = (x.shape[0], *[1] * (x.ndim - 1))
        kept = jax.random.bernoulli(self.make_rng("dropout"), keep, shape)
        # One number for each sample is all that the gradient needs.
        scale = jax.lax.stop_gradient(kept / keep)
        return x * scale.astype(x.dtype)
