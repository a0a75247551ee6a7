"""`flax.nnx` layers whose residuals are compact, and any model made of them."""

from dropit_jax.nnx.conversion import Change, apply
from dropit_jax.nnx.dropping import drop
from dropit_jax.nnx.layers import (
    Conv,
    ConvTranspose,
    Einsum,
    Linear,
    LinearGeneral,
    MultiHeadAttention,
)
from dropit_jax.nnx.norms import (
    BatchNorm,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    RMSNorm,
)
from dropit_jax.nnx.stochastic import Dropout

__all__ = [
    "BatchNorm",
    "Change",
    "Conv",
    "ConvTranspose",
    "Dropout",
    "Einsum",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "Linear",
    "LinearGeneral",
    "MultiHeadAttention",
    "RMSNorm",
    "apply",
    "drop",
]
