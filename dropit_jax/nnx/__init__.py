"""`flax.nnx` layers that store their input compressed, `apply`, and `drop` for nnx."""

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

__all__ = [
    "Change",
    "Conv",
    "ConvTranspose",
    "Einsum",
    "Linear",
    "LinearGeneral",
    "MultiHeadAttention",
    "apply",
    "drop",
]
