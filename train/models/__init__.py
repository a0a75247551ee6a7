"""Creates models by name."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from train.models.checks import check_choice
from train.models.layers import FLAX, REMATS, Layers, Remat
from train.models.positions import POSITIONS
from train.models.resnet import STEMS, BasicBlock, BottleneckBlock, ResNet
from train.models.vit import POOLS, ViT

__all__ = [
    "MODELS",
    "POOLS",
    "POSITIONS",
    "REMATS",
    "STEMS",
    "create",
    "defaults",
    "fields",
]


@dataclasses.dataclass(frozen=True)
class _Model:
    """The class of a model and its fields.

    Attributes:
      make: the class.
      fields: the names of the fields that a config sets.
      sizes: the values of the fields that the model's name determines.
    """

    make: type[nn.Module]
    fields: tuple[str, ...]
    sizes: dict[str, Any]


def _resnet(block: type[nn.Module], *stage_sizes: int) -> _Model:
    sizes = {"block": block, "stage_sizes": stage_sizes}
    return _Model(ResNet, ("width", "stem"), sizes)


def _vit(width: int, num_layers: int, num_heads: int) -> _Model:
    fields = ("patch_size", "pool", "positions", "dropout", "drop_path", "scan")
    sizes = {"width": width, "num_layers": num_layers, "num_heads": num_heads}
    return _Model(ViT, fields, sizes)


_MODELS = {
    # He et al., 2016, Table 1.
    "resnet18": _resnet(BasicBlock, 2, 2, 2, 2),
    "resnet34": _resnet(BasicBlock, 3, 4, 6, 3),
    "resnet50": _resnet(BottleneckBlock, 3, 4, 6, 3),
    # big_vision's name for its smallest size, for tests.
    "vit_mu": _vit(32, 1, 2),
    # Touvron et al., 2021, Table 1, and Dosovitskiy et al., 2021, Table 1.
    "vit_ti": _vit(192, 12, 3),
    "vit_s": _vit(384, 12, 6),
    "vit_b": _vit(768, 12, 12),
    "vit_l": _vit(1024, 24, 16),
}

MODELS = tuple(_MODELS)


def fields(name: str) -> tuple[str, ...]:
    """Returns the names of the fields that a config sets for a model, except "name".

    For "resnet18": `("width", "stem")`.

    Raises:
      ValueError: the model is unknown.
    """
    return _model(name).fields


def defaults(name: str) -> dict[str, Any]:
    """Returns the default of each of a model's `fields`.

    For "resnet18": `{"width": 64, "stem": "cifar"}`.

    Raises:
      ValueError: the model is unknown.
    """
    model = _model(name)
    values = {field.name: field.default for field in dataclasses.fields(model.make)}
    return {field: values[field] for field in model.fields}


def create(
    name: str,
    num_classes: int,
    dtype: str | None = None,
    *,
    layers: Layers = FLAX,
    remat: Remat = "none",
    **values: Any,
) -> nn.Module:
    """Returns the model of a name.

    The model maps images and the flag `train` to logits:
    `(batch, height, width, channels) -> (batch, num_classes)`.

    Args:
      name: one of `MODELS`.
      num_classes: the number of classes.
      dtype: the dtype of the computation, such as `"bfloat16"`; `None`: `"float32"`.
        Parameters, batch statistics and logits are always float32.
      layers: the layers of which the model is built.
      remat: the recomputed blocks, as in `layers.remat`.
      **values: values of the model's `fields`; the others have their defaults.

    Raises:
      ValueError: the model is unknown, or the dtype is not floating-point.
      TypeError: the model has no such field.
    """
    model = _model(name)
    for field in values:
        if field not in model.fields:
            raise TypeError(
                f"{name} has no field {field!r}; it has {', '.join(model.fields)}."
            )
    return model.make(
        num_classes=num_classes,
        dtype=_computation(dtype),
        layers=layers,
        remat=remat,
        **model.sizes,
        **values,
    )


def _model(name: str) -> _Model:
    check_choice("model", name, MODELS)
    return _MODELS[name]


def _computation(dtype: str | None) -> Any:
    if dtype is None:
        return None
    try:
        floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:  # NumPy knows no such type
        floating = False
    if not floating:
        raise ValueError(f"dtype: must be a floating-point type, got {dtype!r}.")
    # With float32 images and parameters, `None` means float32 without casts.
    return None if jnp.dtype(dtype) == jnp.float32 else jnp.dtype(dtype)
