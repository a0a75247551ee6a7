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
from dropit_jax.nn.attention import dot_product_attention
from dropit_jax.nn.dropout import dropout
from dropit_jax.nn.losses import (
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
)
from dropit_jax.nn.norms import batch_norm, group_norm, layer_norm, rms_norm
from dropit_jax.nn.pooling import max_pool
from dropit_jax.nn.recompute import recompute

__all__ = [
    "batch_norm",
    "dot_product_attention",
    "dropout",
    "gelu",
    "group_norm",
    "layer_norm",
    "leaky_relu",
    "max_pool",
    "recompute",
    "relu",
    "relu6",
    "rms_norm",
    "sigmoid",
    "silu",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
    "swish",
    "tanh",
]
