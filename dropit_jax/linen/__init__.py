"""`flax.linen` layers that store their input compressed; a context for any model."""

from dropit_jax.linen.interception import InterceptedLayer, Interception, intercept
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

__all__ = [
    "Conv",
    "ConvLocal",
    "ConvTranspose",
    "Dense",
    "DenseGeneral",
    "Einsum",
    "InterceptedLayer",
    "Interception",
    "MultiHeadAttention",
    "MultiHeadDotProductAttention",
    "SelfAttention",
    "intercept",
]
