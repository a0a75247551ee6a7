"""Stacks and unstacks the parameters of blocks, which a scan over blocks stacks."""

import operator

import jax
import numpy as np

from train.weights.tensors import LazyArray, Specs

_STACK = "/encoderblock/"


def layer_names(name: str, shape: tuple[int, ...]) -> list[str] | None:
    """Returns the names of a stacked variable's parts, `None` for one not stacked.

    "params/Transformer/encoderblock/LayerNorm_0/bias" of shape (2, 8) has the parts
    ".../encoderblock_0/LayerNorm_0/bias" and ".../encoderblock_1/LayerNorm_0/bias".
    """
    if _STACK not in name or not shape:
        return None
    return [
        name.replace(_STACK, f"/encoderblock_{number}/") for number in range(shape[0])
    ]


def unstack_specs(specs: Specs) -> Specs:
    """Returns specs with each stacked `(n, *shape)` replaced by n of `shape`."""
    unstacked: Specs = {}
    for name, spec in specs.items():
        names = layer_names(name, spec.shape)
        layer = jax.ShapeDtypeStruct(spec.shape[1:], spec.dtype)
        unstacked |= {name: spec} if names is None else dict.fromkeys(names, layer)
    return unstacked


def unstack(name: str, tensor: LazyArray, most: int) -> list[tuple[str, LazyArray]]:
    """Returns the names and tensors of the blocks of a stacked tensor.

    A tensor that is not stacked is returned alone, and so is one of more than `most`
    blocks, since no model has as many.
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
    """Stacks the arrays of single blocks to the variables that `specs` names.

    Removes arrays from `arrays` while stacking, so that not all are in memory twice.
    """
    result = {}
    for name, spec in specs.items():
        names = layer_names(name, spec.shape)
        if names is not None:
            result[name] = np.stack([arrays.pop(layer) for layer in names])
        elif name in arrays:
            result[name] = arrays.pop(name)
    return result
