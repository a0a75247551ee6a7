"""Kernels and their gradients in three layers of a model (paper, Figure 4)."""

import functools
import operator
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from train import data
from train.engine import step as step_lib

PARTS = ("parameters", "gradients")
MOMENTS = ("at the beginning", "at the end")

# By layer, then by (part, moment): the elements of the layer's kernel or its gradient.
Distributions = Mapping[str, Mapping[tuple[str, str], np.ndarray]]


def distributions(
    config: ConfigDict, states: tuple[step_lib.State, ...], batch: data.Batch
) -> Distributions:
    """Returns up to three kernels, and their gradients on one batch, as flat arrays.

    The layers are the first, the middle and the last of `kernels`.

    Args:
      config: config of the run, whose training gradient is taken.
      states: states at each of `MOMENTS`.
      batch: batch of the gradients.
    """
    layers = _first_middle_last(kernels(config))
    found: dict[str, dict[tuple[str, str], np.ndarray]] = {
        "/".join(layer): {} for layer in layers
    }
    gradient_fn = jax.jit(step_lib.gradient(config))
    for moment, state in zip(MOMENTS, states, strict=True):
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        gradients, _ = gradient_fn(state.params, state.batch_stats, batch, rng)
        for part, tree in zip(PARTS, (state.params, gradients), strict=True):
            for layer in layers:
                kernel = functools.reduce(operator.getitem, layer, tree)["kernel"]
                found["/".join(layer)][part, moment] = np.asarray(kernel).ravel()
    return found


def kernels(config: ConfigDict) -> list[tuple[str, ...]]:
    """Returns the paths of the layers with a kernel, in the order of their calls.

    Layers that do not read all of their input are left out. Scanned blocks have one
    path together: their kernels are stacked in one array.
    """
    model, found = step_lib.create_model(config), dict[tuple[str, ...], None]()

    def record(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        result = next_fun(*args, **kwargs)
        module = context.module
        has_kernel = module.scope and module.has_variable("params", "kernel")
        if has_kernel and reads_all(module):
            found.setdefault(module.path)
        return result

    def call(variables: Any, images: Any) -> Any:
        with nn.intercept_methods(record):
            return model.apply(variables, images, train=False)

    state = step_lib.abstract_state(config)
    jax.eval_shape(call, state.variables, step_lib.abstract_images(config))
    return list(found)


def reads_all(layer: nn.Module) -> bool:
    """Returns whether a layer reads all its input; a 1x1 Conv of stride 2 does not."""
    if not isinstance(layer, nn.Conv):
        return True
    strides = np.broadcast_to(layer.strides or 1, np.shape(layer.kernel_size))
    return bool(np.all(np.asarray(layer.kernel_size) >= strides))


def _first_middle_last(layers: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Returns the first, the middle and the last of the layers, without repeats."""
    places = (0, len(layers) // 2, len(layers) - 1)
    return list(dict.fromkeys(layers[place] for place in places))
