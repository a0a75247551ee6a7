"""The layers and functions of a preset, to build `flax.linen` models of."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array

from dropit_jax import nn as compact
from dropit_jax.linen import layers, norms, stochastic
from dropit_jax.presets import Preset

_Function = Callable[..., Array]
_Layer = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Toolbox:
    """Layers and functions with the arguments of those in `flax.linen`.

    Made by `toolbox`. A model that is built of them, with the preset as a field, has
    the same parameters and the same output at every level.
    """

    Dense: _Layer
    DenseGeneral: _Layer
    Conv: _Layer
    MultiHeadDotProductAttention: _Layer
    BatchNorm: _Layer
    LayerNorm: _Layer
    GroupNorm: _Layer
    RMSNorm: _Layer
    Dropout: _Layer
    relu: _Function
    gelu: _Function
    silu: _Function
    tanh: _Function
    sigmoid: _Function
    max_pool: _Function
    dot_product_attention: _Function
    remat: Callable[..., type[nn.Module]]


def toolbox(preset: Preset) -> Toolbox:
    """The layers and functions of a preset."""
    drop = preset.dropit
    bits = compact if preset.one_bit else nn
    codes = compact if preset.eight_bit else nn
    normal: Any = norms if preset.eight_bit else nn
    attention = codes.dot_product_attention
    return Toolbox(
        Dense=functools.partial(layers.Dense, dropit=drop),
        DenseGeneral=functools.partial(layers.DenseGeneral, dropit=drop),
        Conv=functools.partial(layers.Conv, dropit=drop),
        MultiHeadDotProductAttention=functools.partial(
            layers.MultiHeadDotProductAttention, dropit=drop, attention_fn=attention
        ),
        BatchNorm=normal.BatchNorm,
        LayerNorm=normal.LayerNorm,
        GroupNorm=normal.GroupNorm,
        RMSNorm=normal.RMSNorm,
        Dropout=stochastic.Dropout if preset.one_bit else nn.Dropout,
        relu=bits.relu,
        gelu=codes.gelu,
        silu=codes.silu,
        tanh=codes.tanh,
        sigmoid=codes.sigmoid,
        max_pool=bits.max_pool,
        dot_product_attention=attention,
        remat=functools.partial(_remat, preset.remat),
    )


def _remat(
    remat: str, block: type[nn.Module], static_argnums: tuple[int, ...] = ()
) -> type[nn.Module]:
    """A block of a model, recomputed in the backward pass as the preset says."""
    if remat == "none":
        return block
    policy = None
    if remat == "dots":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    # Flax counts `self` as argument 0.
    return nn.remat(block, static_argnums=static_argnums, policy=policy)
