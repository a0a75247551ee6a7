"""Models by name."""

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
    """How a model is made.

    Attributes:
      make: its class.
      fields: what a config says of it, beside its name.
      sizes: what its name says of it.
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
    # big_vision's name for a size to test with.
    "vit_mu": _vit(32, 1, 2),
    # Touvron et al., 2021, Table 1, and Dosovitskiy et al., 2021, Table 1.
    "vit_ti": _vit(192, 12, 3),
    "vit_s": _vit(384, 12, 6),
    "vit_b": _vit(768, 12, 12),
    "vit_l": _vit(1024, 24, 16),
}

MODELS = tuple(_MODELS)


def fields(name: str) -> tuple[str, ...]:
    """What a config says of the model of that name, beside the name.

    Raises:
      ValueError: there is no such model.
    """
    return _model(name).fields


def defaults(name: str) -> dict[str, Any]:
    """What these fields are where a config does not say.

    Raises:
      ValueError: there is no such model.
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
    """The model of that name, one of `MODELS`.

    It maps images and a flag, whether it is being trained, to logits.

    Args:
      name: the model's.
      num_classes: size of its output.
      dtype: of the computation, such as `"bfloat16"`; `None` is `"float32"`, which
        parameters, batch statistics and logits always are.
      layers: the layers that it is built of.
      remat: the blocks that are recomputed: as in `layers.remat`.
      **values: of its `fields`; those that are not given are its class's own.

    Raises:
      ValueError: there is no such model, or the dtype is not floating-point.
      TypeError: it has no such field.
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
    # Of float32 images and parameters it is the same, with no casts in the program.
    return None if jnp.dtype(dtype) == jnp.float32 else jnp.dtype(dtype)
