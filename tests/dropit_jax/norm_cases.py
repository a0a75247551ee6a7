"""Norms to test, and what the tests of them run."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dropit_jax import linen as dn


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer, and what its options come to, by hand.

    Attributes:
      kind: its class.
      shape: of the input.
      axes: over which statistics are taken, but for that of groups of channels.
      options: of the layer.
      group_size: of the groups of channels that share statistics.
      features: the axes along which scale and bias vary.
      dtype: of the input.
      mask: the shape of a mask.
    """

    kind: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    group_size: int | None = None
    features: tuple[int, ...] = (-1,)
    dtype: str = "float32"
    mask: tuple[int, ...] | None = None

    @property
    def arguments(self):
        """Those of the call."""
        if self.mask is None:
            return {}
        mask = np.random.default_rng(2).random(self.mask) < 0.8
        return {"mask": jnp.asarray(mask)}

    @property
    def layers(self):
        """Flax's, and ours."""
        return [getattr(m, self.kind)(**self.options) for m in (nn, dn)]


BATCH = {"use_running_average": False}
PLAIN = {"use_scale": False, "use_bias": False}
_SLOW = {"use_fast_variance": False}
_HALF = {"dtype": jnp.bfloat16}
_HALF_PARAMS = {"param_dtype": jnp.bfloat16}

CASES = {
    "batch": Case("BatchNorm", (6, 3, 16), (0, 1), BATCH),
    "batch_bfloat16": Case("BatchNorm", (4, 3, 128), (0, 1), BATCH, dtype="bfloat16"),
    "batch_plain": Case("BatchNorm", (6, 3, 16), (0, 1), BATCH | PLAIN | _SLOW),
    "batch_axis": Case(
        "BatchNorm", (4, 5, 8), (0, 2), BATCH | _HALF | {"axis": 1}, features=(1,)
    ),
    "batch_mask": Case("BatchNorm", (6, 3, 16), (0, 1), BATCH, mask=(6, 3, 1)),
    "layer": Case("LayerNorm", (3, 5, 24), (2,)),
    "layer_one": Case("LayerNorm", (70,), (0,), _SLOW),
    "layer_bfloat16": Case(
        "LayerNorm", (2, 3, 128), (2,), _HALF_PARAMS, dtype="bfloat16"
    ),
    "layer_float16": Case("LayerNorm", (3, 24), (1,), _HALF, dtype="float16"),
    "layer_axes": Case(
        "LayerNorm",
        (3, 4, 16),
        (0, 2),
        {"reduction_axes": (0, -1), "feature_axes": (1, 2)},
        features=(1, 2),
    ),
    "layer_mask": Case(
        "LayerNorm", (3, 5, 24), (2,), _SLOW | {"use_bias": False}, mask=(3, 5, 24)
    ),
    "rms": Case("RMSNorm", (3, 5, 24), (2,)),
    "rms_plain": Case(
        "RMSNorm", (2, 128), (1,), {"use_scale": False}, dtype="bfloat16", mask=(128,)
    ),
    "group": Case("GroupNorm", (2, 3, 3, 16), (1, 2), {"num_groups": 4}, group_size=4),
    "group_size": Case(
        "GroupNorm",
        (2, 9, 16),
        (1,),
        {"num_groups": None, "group_size": 2, "use_scale": False},
        group_size=2,
        mask=(2, 9, 16),
    ),
    "group_axes": Case(
        "GroupNorm",
        (2, 5, 64),
        (),
        {"num_groups": 2, "reduction_axes": (-1,)},
        group_size=32,
        dtype="float16",
    ),
    "instance": Case("InstanceNorm", (2, 4, 4, 6), (1, 2)),
    "instance_axes": Case(
        "InstanceNorm", (3, 4, 5, 6), (2,), {"feature_axes": (1, 3)}, features=(1, 3)
    ),
}
EACH = ("batch", "layer", "rms", "group", "instance")


def numbers(seed, shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(0.5, 2, shape), dtype)


def variables(layer, x):
    """Parameters and running averages that are neither 0 nor 1."""
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda a: jnp.asarray(rng.uniform(0.5, 1.5, a.shape), a.dtype), shapes
    )


def run(layer, variables, x, cotangent, **arguments):
    """The output, what is updated, and the gradients of parameters and input."""

    def call(params, x):
        used = variables | {"params": params}
        return layer.apply(used, x, mutable=["batch_stats"], **arguments)

    @jax.jit
    def run(params, x, cotangent):
        y, pullback, updated = jax.vjp(call, params, x, has_aux=True)
        return y, updated, *pullback(cotangent.astype(y.dtype))

    return run(variables.get("params", {}), x, cotangent)


def wide(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def assert_near_as_a_whole(actual, expected):
    for a, e in zip(*map(jax.tree.leaves, wide((actual, expected))), strict=True):
        assert np.linalg.norm(a - e) <= 0.015 * np.linalg.norm(e)


def cached(fn, *args):
    """The bytes of what the backward pass of a function reads."""
    pullback = jax.eval_shape(lambda *args: jax.vjp(fn, *args)[1], *args)
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pullback)]
    return sorted(size for size in sizes if size)
