"""DropIT: cache less of what the backward pass of a Flax model reads."""

from dropit_jax import linen, nn
from dropit_jax.ops import conv_general_dilated, dot_general
from dropit_jax.policy import DropIT
from dropit_jax.residual import Residual, compress

__all__ = [
    "DropIT",
    "Residual",
    "compress",
    "conv_general_dilated",
    "dot_general",
    "linen",
    "nn",
]
