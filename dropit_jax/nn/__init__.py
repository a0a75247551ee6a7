"""Activation functions whose residuals take one bit or one byte an element."""

from dropit_jax.nn.activations import (
    gelu,
    leaky_relu,
    relu,
    relu6,
    sigmoid,
    silu,
    swish,
    tanh,
)

__all__ = [
    "gelu",
    "leaky_relu",
    "relu",
    "relu6",
    "sigmoid",
    "silu",
    "swish",
    "tanh",
]
