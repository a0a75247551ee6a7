"""Models by name."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from dropit_jax import Preset
from train.models.resnet import STEMS, ResNet
from train.models.vit import ViT

__all__ = ["MODELS", "STEMS", "create", "fields"]


@dataclasses.dataclass(frozen=True)
class _Model:
    """How a model is made.

    Attributes:
      make: its class.
      fields: what a config says of it, beside its name.
      sizes: what its name says of it.
    """

    make: Callable[..., nn.Module]
    fields: tuple[str, ...]
    sizes: dict[str, Any]


def _vit(width: int, num_layers: int, num_heads: int) -> _Model:
    sizes = {"width": width, "num_layers": num_layers, "num_heads": num_heads}
    return _Model(ViT, ("patch_size",), sizes)


_MODELS = {
    "resnet18": _Model(ResNet, ("width", "stem"), {"stage_sizes": (2, 2, 2, 2)}),
    # Touvron et al., 2021, Table 1, and Dosovitskiy et al., 2021, Table 1.
    "vit_ti": _vit(192, 12, 3),
    "vit_s": _vit(384, 12, 6),
    "vit_b": _vit(768, 12, 12),
    "vit_l": _vit(1024, 24, 16),
}

MODELS = tuple(_MODELS)


def fields(name: str) -> tuple[str, ...]:
    """What a config says of the model of that name, beside the name."""
    return _MODELS[name].fields


def create(name: str, num_classes: int, memory: Preset, **values: Any) -> nn.Module:
    """The model of that name, one of `MODELS`.

    It maps images and a flag, whether it is being trained, to logits.

    Args:
      name: the model's.
      num_classes: size of its output.
      memory: what it caches.
      **values: of its `fields`.
    """
    model = _MODELS[name]
    return model.make(num_classes=num_classes, memory=memory, **model.sizes, **values)
