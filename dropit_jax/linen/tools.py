"""The layers and functions of a preset, to build `flax.linen` models of."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
from jaxtyping import Array

from dropit_jax import nn as compact
from dropit_jax.layer_presets import LayerPreset
from dropit_jax.linen import layers, norms, stochastic
from dropit_jax.linen.remat import remat

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
    Einsum: _Layer
    Conv: _Layer
    ConvLocal: _Layer
    ConvTranspose: _Layer
    MultiHeadDotProductAttention: _Layer
    MultiHeadAttention: _Layer
    SelfAttention: _Layer
    BatchNorm: _Layer
    LayerNorm: _Layer
    GroupNorm: _Layer
    InstanceNorm: _Layer
    RMSNorm: _Layer
    Dropout: _Layer
    relu: _Function
    relu6: _Function
    leaky_relu: _Function
    gelu: _Function
    silu: _Function
    tanh: _Function
    sigmoid: _Function
    max_pool: _Function
    dot_product_attention: _Function
    remat: Callable[..., type[nn.Module]]


def toolbox(preset: LayerPreset) -> Toolbox:
    """The layers and functions of a preset.

    Raises:
      TypeError: it is none.
    """
    if not isinstance(preset, LayerPreset):
        raise TypeError(
            f'toolbox takes a preset, such as layer_preset("lean"); got {preset!r}.'
        )
    bits = compact if preset.one_bit else nn
    codes = compact if preset.eight_bit else nn
    normal: Any = norms if preset.eight_bit else nn
    attend = attention(preset)

    def dense(layer: _Layer, **fields: Any) -> _Layer:
        return functools.partial(layer, dropit=preset.dropit, **fields)

    def conv(layer: _Layer) -> _Layer:
        return functools.partial(layer, dropit=preset.conv)

    def attending(layer: _Layer) -> _Layer:
        return dense(layer, attention_fn=attend)

    return Toolbox(
        Dense=dense(layers.Dense),
        DenseGeneral=dense(layers.DenseGeneral),
        Einsum=dense(layers.Einsum),
        Conv=conv(layers.Conv),
        ConvLocal=conv(layers.ConvLocal),
        ConvTranspose=conv(layers.ConvTranspose),
        MultiHeadDotProductAttention=attending(layers.MultiHeadDotProductAttention),
        MultiHeadAttention=attending(layers.MultiHeadAttention),
        SelfAttention=attending(layers.SelfAttention),
        BatchNorm=normal.BatchNorm,
        LayerNorm=normal.LayerNorm,
        GroupNorm=normal.GroupNorm,
        InstanceNorm=normal.InstanceNorm,
        RMSNorm=normal.RMSNorm,
        Dropout=stochastic.Dropout if preset.one_bit else nn.Dropout,
        relu=bits.relu,
        relu6=bits.relu6,
        leaky_relu=bits.leaky_relu,
        gelu=codes.gelu,
        silu=codes.silu,
        tanh=codes.tanh,
        sigmoid=codes.sigmoid,
        max_pool=bits.max_pool,
        dot_product_attention=attend,
        remat=functools.partial(remat, preset=preset),
    )


def attention(preset: LayerPreset) -> _Function:
    """The core of attention of a preset."""
    return _compact_attention if preset.eight_bit else nn.dot_product_attention


# One object: functions are compared by identity where JAX keeps what it has traced.
_compact_attention = functools.partial(compact.dot_product_attention, bits=8)
