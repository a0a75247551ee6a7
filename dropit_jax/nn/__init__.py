"""Functions of networks whose cached residual is compact."""

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
