"""The tests of layers call them with these arguments, inputs and variables."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dropit_jax import DropIT

POLICY = DropIT(0.5)

_MASK = np.broadcast_to(np.eye(3)[..., None, None], (3, 3, 16, 8))

# (layer, its arguments, input shape): what Flax documents.
_PARTITIONED = nn.with_partitioning(
    nn.initializers.lecun_normal(), (None, None, "x", "y")
)

# Options that do not meet in the code of a layer share a case.
_DENSES = (
    (
        {
            "features": 8,
            "use_bias": False,
            "precision": lax.Precision.HIGHEST,
            "dot_general": functools.partial(lax.dot_general),
        },
        (2, 3, 5, 32),
    ),
    ({"features": 8, "param_dtype": jnp.bfloat16}, (32,)),
    (
        {
            "features": 8,
            "dtype": jnp.bfloat16,
            "dot_general_cls": lambda: lax.dot_general,
        },
        (4, 32),
    ),
    ({"features": 8, "kernel_init": nn.initializers.ones_init()}, (4, 21)),
    (
        {
            "features": 8,
            "kernel_init": nn.with_partitioning(nn.initializers.normal(), ("x", None)),
            "bias_init": nn.with_partitioning(nn.initializers.normal(), ("x",)),
        },
        (4, 32),
    ),
)


def _to_half(*arrays, **_):
    return [None if array is None else array.astype(jnp.bfloat16) for array in arrays]


_TO_HALF = {"promote_dtype": _to_half}
_DENSES += (({"features": 8, **_TO_HALF}, (4, 32)),)
_DENSE_GENERALS = (
    ({"features": 8, **_TO_HALF}, (4, 32)),
    (
        {"features": (4, 2), "axis": (-2, -1), "precision": lax.Precision.HIGHEST},
        (3, 5, 4, 8),
    ),
    (
        {
            "features": 6,
            "axis": (1, -1),
            "use_bias": False,
            "dot_general": functools.partial(lax.dot_general),
        },
        (3, 5, 4, 8),
    ),
    ({"features": (4, 2), "axis": (3, 1)}, (2, 3, 5, 8)),
    (
        {
            "features": 8,
            "batch_dims": (0,),
            "dot_general_cls": lambda: lax.dot_general,
        },
        (3, 5, 16),
    ),
    ({"features": (4, 2), "axis": -1, "batch_dims": (0, 1)}, (2, 3, 5, 16)),
    ({"features": 8, "dtype": jnp.bfloat16}, (2, 5, 21)),
    ({"features": 8, "param_dtype": jnp.bfloat16, "axis": 1}, (2, 21, 3)),
    ({"features": (2, 4), "axis": (1, 2), "kernel_init": _PARTITIONED}, (3, 4, 8)),
)
_EINSUMS = (
    ({"shape": (32, 8), "einsum_str": "bd,dh->bh", **_TO_HALF}, (4, 32)),
    ({"shape": (4, 8, 6), "einsum_str": "bthd,hdf->btf"}, (2, 3, 4, 8)),
    ({"shape": (5, 6, 7), "einsum_str": "abc,cde->abde"}, (3, 4, 5)),
    ({"shape": (4, 8, 6), "einsum_str": "bhd,hde->bhe"}, (2, 4, 8)),
    ({"shape": (16, 3), "einsum_str": "...d,de->...e", "use_bias": False}, (2, 5, 16)),
    (
        {"shape": (16, 8), "einsum_str": "db, df -> bf", "param_dtype": jnp.bfloat16},
        (16, 3),
    ),
    ({"shape": (7, 6), "einsum_str": " ab c , c d - > a b d"}, (3, 4, 7)),
    ({"shape": (7, 6), "einsum_str": "abc,cd- >abd", "use_bias": False}, (3, 4, 7)),
    (
        {
            "shape": (16, 8),
            "einsum_str": "bd,df->bf",
            "precision": lax.Precision.HIGHEST,
            "preferred_element_type": jnp.float32,
            "dtype": jnp.bfloat16,
        },
        (4, 16),
    ),
    (
        {
            "shape": (16, 8),
            "einsum_str": "bd,df->bf",
            "kernel_init": nn.with_partitioning(nn.initializers.normal(), ("x", None)),
        },
        (4, 16),
    ),
)
_CONVS = (
    ({"features": 8, "kernel_size": (3, 3), **_TO_HALF}, (2, 6, 6, 16)),
    (
        {
            "features": 8,
            "kernel_size": (3, 3),
            "strides": None,
            "input_dilation": None,
            "kernel_dilation": None,
            "feature_group_count": 2,
            "conv_general_dilated": functools.partial(lax.conv_general_dilated),
        },
        (2, 6, 6, 16),
    ),
    ({"features": 8, "kernel_size": (3, 3), "use_bias": False}, (6, 6, 16)),
    ({"features": 8, "kernel_size": (3, 3)}, (2, 3, 6, 6, 16)),
    ({"features": 8, "kernel_size": 3, "padding": "CAUSAL"}, (2, 9, 16)),
    ({"features": 8, "kernel_size": (3, 3), "padding": "CIRCULAR"}, (2, 6, 6, 16)),
    ({"features": 8, "kernel_size": (3, 3), "padding": "REFLECT"}, (2, 6, 6, 16)),
    (
        {
            "features": 8,
            "kernel_size": (3, 3),
            "padding": "VALID",
            "param_dtype": jnp.float16,
        },
        (2, 6, 6, 16),
    ),
    ({"features": 8, "kernel_size": (3, 3), "padding": ((1, 2), 0)}, (2, 6, 6, 16)),
    (
        {"features": 8, "kernel_size": (3, 3), "strides": 2, "kernel_dilation": 2},
        (2, 9, 8, 16),
    ),
    (
        {"features": 8, "kernel_size": (3, 3), "input_dilation": 2, "padding": 1},
        (2, 4, 4, 16),
    ),
    ({"features": 8, "kernel_size": (2, 2, 2)}, (2, 4, 4, 4, 16)),
    ({"features": 8, "kernel_size": (1, 1), "dtype": jnp.bfloat16}, (2, 4, 4, 16)),
    ({"features": 8, "kernel_size": (3, 3), "mask": _MASK}, (2, 6, 6, 16)),
    (
        {
            "features": 8,
            "kernel_size": (3, 3),
            "conv_general_dilated_cls": lambda: lax.conv_general_dilated,
        },
        (2, 6, 6, 5),
    ),
    (
        {
            "features": 8,
            "kernel_size": (3, 3),
            "precision": lax.Precision.HIGHEST,
            "kernel_init": _PARTITIONED,
        },
        (2, 6, 6, 16),
    ),
)
_CONV_LOCALS = (
    ({"features": 4, "kernel_size": (3, 3), **_TO_HALF}, (2, 4, 4, 16)),
    (
        {
            "features": 4,
            "kernel_size": (2,),
            "mask": np.broadcast_to(np.arange(5)[:, None, None] > 1, (5, 32, 4)),
            "padding": "VALID",
            "precision": lax.Precision.HIGHEST,
            "kernel_init": nn.with_partitioning(nn.initializers.normal(), (None, "x")),
        },
        (2, 6, 16),
    ),
    ({"features": 4, "kernel_size": (3, 3), "padding": "REFLECT"}, (2, 4, 5, 16)),
    ({"features": 4, "kernel_size": (3, 3), "use_bias": False}, (5, 6, 16)),
    ({"features": 4, "kernel_size": (3, 3)}, (2, 3, 4, 4, 16)),
    ({"features": 4, "kernel_size": (3, 3), "padding": "CIRCULAR"}, (2, 4, 5, 16)),
    (
        {
            "features": 4,
            "kernel_size": 3,
            "padding": "CAUSAL",
            "param_dtype": jnp.bfloat16,
        },
        (2, 9, 16),
    ),
    (
        {"features": 4, "kernel_size": (3, 3), "strides": 2, "kernel_dilation": 2},
        (2, 9, 8, 5),
    ),
    (
        {
            "features": 4,
            "kernel_size": (2, 2),
            "padding": "VALID",
            "dtype": jnp.bfloat16,
        },
        (2, 4, 5, 16),
    ),
)
_CONV_TRANSPOSES = (
    ({"features": 8, "kernel_size": (3, 3), **_TO_HALF}, (2, 5, 6, 16)),
    (
        {
            "features": 8,
            "kernel_size": (3, 3),
            "dtype": jnp.bfloat16,
            "preferred_element_type": jnp.float32,
        },
        (2, 5, 6, 16),
    ),
    ({"features": 8, "kernel_size": (3, 3), "use_bias": False}, (5, 6, 16)),
    ({"features": 8, "kernel_size": (3, 3)}, (2, 3, 4, 4, 16)),
    ({"features": 8, "kernel_size": (3, 3), "strides": (2, 2)}, (2, 4, 5, 16)),
    (
        {"features": 8, "kernel_size": (4, 4), "strides": (2, 2), "padding": "VALID"},
        (2, 4, 4, 16),
    ),
    (
        {
            "features": 8,
            "kernel_size": (3, 3),
            "strides": (2, 2),
            "padding": "CIRCULAR",
        },
        (2, 4, 4, 16),
    ),
    (
        {"features": 8, "kernel_size": (3, 3), "padding": ((1, 2), (0, 1))},
        (2, 4, 4, 16),
    ),
    (
        {
            "features": 8,
            "kernel_size": 3,
            "padding": 1,
            "param_dtype": jnp.bfloat16,
        },
        (2, 9, 16),
    ),
    (
        {
            "features": 16,
            "kernel_size": (3, 3),
            "kernel_dilation": (2, 2),
            "transpose_kernel": True,
        },
        (2, 5, 5, 5),
    ),
    (
        {
            "features": 8,
            "kernel_size": (3, 3),
            "mask": _MASK,
            "precision": lax.Precision.HIGHEST,
            "kernel_init": _PARTITIONED,
        },
        (2, 4, 4, 16),
    ),
)
LAYERS = {
    "Dense": _DENSES,
    "DenseGeneral": _DENSE_GENERALS,
    "Einsum": _EINSUMS,
    "Conv": _CONVS,
    "ConvLocal": _CONV_LOCALS,
    "ConvTranspose": _CONV_TRANSPOSES,
}


def numbers(shape):
    x = np.random.default_rng(0).normal(size=shape)
    return jnp.asarray(np.round(x, 1), jnp.float32)  # with ties


def variables_of(layer, x):
    """Variables of an initialisation's types, which need not be compiled."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 4, leaf.dtype),
        jax.eval_shape(layer.init, jax.random.key(0), x),
    )
