"""Normalisation of pixels for the model's input."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict

from train import data

Normalise = Callable[
    [UInt8[Array, "batch height width channels"]],
    Float[Array, "batch height width channels"],
]

# Maps to [-1, 1], as Google's vision transformers were trained.
_UNIT = 127.5


def normaliser(config: ConfigDict) -> Normalise:
    """Returns a function that normalises uint8 pixels to float32, of the same shape.

    The function subtracts each channel's mean, and divides by its standard deviation in
    the dataset (`config.normalise="dataset"`), or takes 127.5 for both (`"unit"`). It
    runs in the step, so that images are copied to the device and wait there as
    uint8, in a quarter of the bytes.
    """
    mean: tuple[float, ...] | float = _UNIT
    std: tuple[float, ...] | float = _UNIT
    if config.normalise == "dataset":
        info = data.info(config.dataset, config.data_dir)
        mean, std = info.mean, info.std

    def normalise(images: UInt8[Array, "..."]) -> Float[Array, "..."]:
        channels = (*[1] * (images.ndim - 1), -1)
        mean_, std_ = (
            jnp.asarray(value, jnp.float32).reshape(channels) for value in (mean, std)
        )
        return (images.astype(jnp.float32) - mean_) / std_

    return normalise
