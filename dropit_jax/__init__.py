"""DropIT: cache less of what the backward pass of a Flax model reads."""

from dropit_jax import linen, nn, nnx
from dropit_jax.ops import conv_general_dilated, dot_general, einsum
from dropit_jax.policy import DropIT
from dropit_jax.presets import PRESETS, Preset, preset
from dropit_jax.residual import Residual, compress

__all__ = [
    "PRESETS",
    "DropIT",
    "Preset",
    "Residual",
    "compress",
    "conv_general_dilated",
    "dot_general",
    "einsum",
    "linen",
    "nn",
    "nnx",
    "preset",
]
