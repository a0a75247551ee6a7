"""Blocks that are scanned, whose parameters are stacked, and those that are not."""

import operator

import jax
import numpy as np

from train.weights.tensors import Specs, Tensor

_STACK = "/encoderblock/"


def layer_names(name: str, shape: tuple[int, ...]) -> list[str] | None:
    """The names of a variable in each of the blocks that it is stacked of.

    `None`: it is not stacked.
    """
    if _STACK not in name or not shape:
        return None
    return [
        name.replace(_STACK, f"/encoderblock_{number}/") for number in range(shape[0])
    ]


def unstack_specs(specs: Specs) -> Specs:
    """Shapes and dtypes, with those of scanned blocks as if each were its own."""
    apart: Specs = {}
    for name, spec in specs.items():
        names = layer_names(name, spec.shape)
        layer = jax.ShapeDtypeStruct(spec.shape[1:], spec.dtype)
        apart |= {name: spec} if names is None else dict.fromkeys(names, layer)
    return apart


def unstack(name: str, tensor: Tensor, most: int) -> list[tuple[str, Tensor]]:
    """A tensor by name, or, of scanned blocks, one for each of them (views).

    More blocks than `most` are left as they are, which no model is.
    """
    if tensor.shape and tensor.shape[0] > most:
        return [(name, tensor)]
    names = layer_names(name, tensor.shape)
    if names is None:
        return [(name, tensor)]
    return [
        (layer, tensor.map(operator.itemgetter(number)))
        for number, layer in enumerate(names)
    ]


def stack(arrays: dict[str, np.ndarray], specs: Specs) -> dict[str, np.ndarray]:
    """Arrays of single blocks as variables of the given names.

    They are taken out of `arrays`, so that not all of them are in memory twice.
    """
    whole = {}
    for name, spec in specs.items():
        names = layer_names(name, spec.shape)
        if names is not None:
            whole[name] = np.stack([arrays.pop(layer) for layer in names])
        elif name in arrays:
            whole[name] = arrays.pop(name)
    return whole
