"""`flax.linen` layers that cache their input compressed, and any model made of them."""

from dropit_jax.linen.interception import Interception, intercept
from dropit_jax.linen.layers import (
    Conv,
    ConvLocal,
    ConvTranspose,
    Dense,
    DenseGeneral,
    Einsum,
    MultiHeadAttention,
    MultiHeadDotProductAttention,
    SelfAttention,
)
from dropit_jax.linen.norms import (
    BatchNorm,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    RMSNorm,
)
from dropit_jax.linen.report import InterceptedLayer, Unreached
from dropit_jax.linen.stochastic import Dropout
from dropit_jax.linen.tools import Toolbox, toolbox

__all__ = [
    "BatchNorm",
    "Conv",
    "ConvLocal",
    "ConvTranspose",
    "Dense",
    "DenseGeneral",
    "Dropout",
    "Einsum",
    "GroupNorm",
    "InstanceNorm",
    "InterceptedLayer",
    "Interception",
    "LayerNorm",
    "MultiHeadAttention",
    "MultiHeadDotProductAttention",
    "RMSNorm",
    "SelfAttention",
    "Toolbox",
    "Unreached",
    "intercept",
    "toolbox",
]
