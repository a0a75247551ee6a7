"""Models by name."""

from collections.abc import Callable

import flax.linen as nn

from dropit_jax import DropIT
from train.models.resnet import STEMS, ResNet, Stem

__all__ = ["MODELS", "STEMS", "create"]


def _resnet18(
    num_classes: int, width: int, stem: Stem, dropit: DropIT | None
) -> nn.Module:
    return ResNet(num_classes, (2, 2, 2, 2), width=width, stem=stem, dropit=dropit)


_MODELS: dict[str, Callable[..., nn.Module]] = {"resnet18": _resnet18}

MODELS = tuple(_MODELS)


def create(
    name: str, num_classes: int, *, width: int, stem: Stem, dropit: DropIT | None
) -> nn.Module:
    """The model of that name, one of `MODELS`.

    It maps images and a flag, whether it is being trained, to logits.
    """
    return _MODELS[name](num_classes, width, stem, dropit)
