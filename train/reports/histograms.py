"""Parameters and gradients of first, middle and last layers (paper, Figure 4)."""

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

# By layer; of each, by part and moment, the elements of its kernel.
Distributions = Mapping[str, Mapping[tuple[str, str], np.ndarray]]


def distributions(
    config: ConfigDict, states: tuple[step_lib.State, ...], batch: data.Batch
) -> Distributions:
    """What the kernels of three layers, and their gradients on one batch, consist of.

    Args:
      config: of the run; the gradients are those that it trains with.
      states: at each of `MOMENTS`.
      batch: what the gradients are of.
    """
    layers = _three(kernels(config))
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
    """The paths of the layers with a kernel, in the order in which they are called.

    But for those that do not read all of their input.
    """
    model, found = step_lib.create_model(config), dict[tuple[str, ...], None]()

    def note(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        result = next_fun(*args, **kwargs)
        module = context.module
        has_kernel = module.scope and module.has_variable("params", "kernel")
        if has_kernel and reads_all(module):
            found.setdefault(module.path)
        return result

    def call(variables: Any, images: Any) -> Any:
        with nn.intercept_methods(note):
            return model.apply(variables, images, train=False)

    state = step_lib.abstract_state(config)
    jax.eval_shape(call, state.variables, step_lib.abstract_images(config))
    return list(found)


def reads_all(layer: nn.Module) -> bool:
    """Whether a layer reads all of its input: a shortcut of stride 2 does not."""
    if not isinstance(layer, nn.Conv):
        return True
    strides = np.broadcast_to(layer.strides or 1, np.shape(layer.kernel_size))
    return bool(np.all(np.asarray(layer.kernel_size) >= strides))


def _three(layers: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The first, the middle and the last, or fewer where there are fewer."""
    places = (0, len(layers) // 2, len(layers) - 1)
    return list(dict.fromkeys(layers[place] for place in places))
