"""Inputs and cotangents of the Dense and Conv layers of a trained model."""

import dataclasses
import functools
import operator
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from train import data
from train.data import pixels
from train.engine import losses
from train.engine import step as step_lib

_KINDS = (nn.Dense, nn.DenseGeneral, nn.Conv)
_Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer with its input and cotangent in a training step.

    Attributes:
      name: the layer's path in the model.
      module: the layer of plain Flax, unbound.
      params: its parameters.
      x: its input activation.
      cotangent: the gradient of the loss with respect to its output.
    """

    name: str
    module: nn.Module
    params: Mapping[str, Array]
    x: Float[Array, "batch *spatial features"]
    cotangent: Float[Array, "batch *spatial features_out"]

    def kernel_gradient(self, x: Array) -> Array:
        """Returns the kernel's gradient for the input `x` in place of the layer's."""

        def output(kernel: Array) -> Array:
            params = {**self.params, "kernel": kernel}
            result: Any = self.module.apply({"params": params}, x)
            return jnp.asarray(result)

        _, pullback = jax.vjp(output, self.params["kernel"])
        (gradient,) = pullback(self.cotangent)
        return gradient


def capture(
    config: ConfigDict, state: step_lib.State, batch: data.Batch
) -> list[Layer]:
    """Returns the Dense and Conv layers of a model, in the order of their calls.

    Args:
      config: the config of the model, of plain Flax.
      state: the model's parameters and statistics.
      batch: images and labels; the loss is the cross-entropy.

    Raises:
      ValueError: the model calls a layer more than once.
    """
    model, normalise = step_lib.create_model(config), pixels.normaliser(config)
    modules: dict[_Path, nn.Module] = {}

    def loss(probes: dict[_Path, Array]) -> tuple[Array, dict[_Path, tuple[Any, Any]]]:
        seen: dict[_Path, tuple[Any, Any]] = {}
        entered: set[_Path] = set()

        def probe(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module, path = context.module, context.module.path
            is_layer = isinstance(module, _KINDS) and context.method_name == "__call__"
            # A path that was entered: the layer's `__call__` calls its parent class's.
            if not is_layer or path in entered:
                return next_fun(*args, **kwargs)
            if path in seen:
                raise ValueError(f"{'/'.join(path)} is called twice in a step.")
            entered.add(path)
            output = next_fun(*args, **kwargs)
            entered.remove(path)
            modules[path] = module.clone(parent=None, name=None)
            seen[path] = (args[0], output)
            # The cotangent of a zero added to the output is that of the output.
            return output + probes[path] if probes else output

        with nn.intercept_methods(probe):
            logits, _ = model.apply(
                {"params": state.params, "batch_stats": state.batch_stats},
                normalise(batch["image"]),
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(0)},
            )
        return losses.cross_entropy(logits, batch["label"], 0.0).mean(), seen

    shapes = jax.eval_shape(lambda: loss({})[1])
    probes = {
        path: jnp.zeros(output.shape, output.dtype)
        for path, (_, output) in shapes.items()
    }
    cotangents, seen = jax.jit(jax.grad(loss, has_aux=True))(probes)
    params: dict[_Path, Any] = {
        path: functools.reduce(operator.getitem, path, state.params) for path in modules
    }
    return [
        Layer("/".join(path), module, params[path], seen[path][0], cotangents[path])
        for path, module in modules.items()
    ]
