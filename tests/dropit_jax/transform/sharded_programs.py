"""Programs whose arrays lie on several devices, and how they are sharded."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit

_RNG = np.random.default_rng(0)


@dataclasses.dataclass(frozen=True)
class Placement:
    """How the arrays of a program are sharded; by default not at all.

    Attributes:
      axes: of the mesh, with their sizes.
      batch: the one that the batch is sharded over.
      features: the one that heads and hidden features are sharded over.
      weights: the one that weights are sharded over where they are not in use.
      axis_type: of all axes.
    """

    axes: tuple[tuple[str, int], ...] = ()
    batch: str | None = None
    features: str | None = None
    weights: str | None = None
    axis_type: AxisType = AUTO

    @property
    def mesh(self) -> jax.sharding.Mesh:
        names, sizes = zip(*self.axes, strict=True)
        return jax.make_mesh(sizes, names, axis_types=(self.axis_type,) * len(names))

    def out(self, ndim: int, features: int | None = None) -> dict[str, P]:
        """The argument that JAX asks for where a product has a sum over devices."""
        if self.axis_type is AUTO:
            return {}
        spec = [self.batch, *[None] * (ndim - 1)]
        if features is not None:
            spec[features] = self.features
        return {"out_sharding": P(*spec)}

    @property
    def gathers(self) -> bool:
        """Whether the program itself gathers weights, as Explicit mode asks for."""
        return self.axis_type is EXPLICIT and self.weights is not None

    def gathered(self, params: Any) -> Any:
        """Weights that are in use."""
        if not self.gathers:
            return params
        return jax.tree.map(lambda p: jax.sharding.reshard(p, P()), params)


ONE_DEVICE = Placement()
PLACEMENTS = {
    "data": Placement((("data", 8),), batch="data"),
    "fsdp": Placement((("data", 8),), batch="data", weights="data"),
    "tensor": Placement((("model", 8),), features="model"),
    "data_tensor": Placement(
        (("data", 4), ("model", 2)), batch="data", features="model"
    ),
}


# Sizes are such that
# - on no mesh two devices share a group of 64 features: their minimum and maximum
#   would meet in two all-reduces of one number a group (`FormsTest` has such groups);
# - the batch is large, so that of weights and activations XLA gathers the weights:
#   activations that are rebuilt would be gathered once more;
# - vectors are not sharded, as each equation that reads one, be it to rebuild a value,
#   gathers it.
def _weight(*shape):
    fan_in = np.prod(shape[:-1])
    return _RNG.normal(size=shape) / np.sqrt(fan_in)


def _normalized(x):
    return x * lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def _mlp(place, params, x):
    params = place.gathered(params)
    for _ in range(2):
        hidden = jax.nn.gelu(x @ params["column"])
        x = x + jnp.einsum("bf,fd->bd", hidden, params["row"], **place.out(2))
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return jnp.mean(jnp.sin(x))


def _batch_norm(x, scale):
    """With statistics of the whole batch."""
    mean = x.mean((0, 1, 2))
    variance = jnp.mean(x**2, axis=(0, 1, 2)) - mean**2
    return (x - mean) * lax.rsqrt(variance + 1e-5) * scale


def _convs(place, params, x):
    params = place.gathered(params)
    conv = functools.partial(
        lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    y = conv(x, params["column"], **place.out(4, features=3))
    y = jax.nn.relu(_batch_norm(y, params["scale"]))
    x = x + conv(y, params["row"], **place.out(4))
    return jnp.mean(jnp.sin(jax.nn.relu(x).mean((1, 2))))


def _block(place, params, x):
    params = place.gathered(params)
    y = _normalized(x)
    q, k, v = (
        jnp.einsum("btd,dhk->bthk", y, params[name], **place.out(4, features=2))
        for name in "qkv"
    )
    scores = jnp.einsum("bqhk,bthk->bhqt", q, k) / np.sqrt(q.shape[-1])
    causal = np.tril(np.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e9))
    y = jnp.einsum("bhqt,bthk->bqhk", weights, v)
    x = x + jnp.einsum("bqhk,hkd->bqd", y, params["out"], **place.out(3))
    y = jax.nn.silu(_normalized(x) @ params["column"])
    return x + jnp.einsum("btf,fd->btd", y, params["row"], **place.out(3))


def _transformer(place, params, x):
    return jnp.mean(jnp.sin(_block(place, params, x)))


def _scanned(place, params, x):
    def turn(x, params):
        params = place.gathered(params)
        y = jnp.tanh(_normalized(x) @ params["column"])
        return x + jnp.einsum("bf,fd->bd", y, params["row"], **place.out(2)), None

    return jnp.mean(jnp.sin(lax.scan(turn, x, params)[0]))


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A function of parameters and a batch.

    Attributes:
      function: of a placement, the parameters and the batch.
      params: by name.
      sharded: of each parameter, the axis that may be sharded, of features or weights.
      x: the batch.
    """

    function: Callable[..., Any]
    params: dict[str, np.ndarray]
    sharded: dict[str, int]
    x: np.ndarray

    def shardings(self, place: Placement, mesh: jax.sharding.Mesh) -> dict[str, Any]:
        name = place.features or place.weights

        def sharding(key):
            axes = range(self.params[key].ndim)
            spec = [name if axis == self.sharded.get(key) else None for axis in axes]
            return NamedSharding(mesh, P(*spec))

        return {key: sharding(key) for key in self.params}


PROGRAMS = {
    "mlp": Program(
        _mlp,
        {"column": _weight(64, 512), "row": _weight(512, 64)},
        {"column": 1, "row": 0},
        _RNG.normal(size=(1024, 64)),
    ),
    "convs": Program(
        _convs,
        {
            "column": _weight(3, 3, 16, 128),
            "row": _weight(3, 3, 128, 16),
            "scale": 1 + _weight(128),
        },
        {"column": 3, "row": 2},
        _RNG.normal(size=(32, 4, 4, 16)),
    ),
    "transformer": Program(
        _transformer,
        {
            **{name: _weight(32, 8, 8) for name in "qkv"},
            "out": _weight(8, 8, 32),
            "column": _weight(32, 512),
            "row": _weight(512, 32),
        },
        {"q": 1, "k": 1, "v": 1, "out": 0, "column": 1, "row": 0},
        _RNG.normal(size=(32, 16, 32)),
    ),
    "scanned": Program(
        _scanned,
        {"column": _weight(3, 64, 512), "row": _weight(3, 512, 64)},
        {"column": 2, "row": 1},
        _RNG.normal(size=(1024, 64)),
    ),
}
