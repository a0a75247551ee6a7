"""The tests of sharding run these models on one device and on meshes of eight."""

import collections
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import dropit_jax
from dropit_jax import DropIT
from dropit_jax import linen as dn

_DEVICES = 8
_COLLECTIVE = re.compile(
    r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)


class Model(nn.Module):
    """A model whose layers are sharded by their names.

    Those called "column..." split what they give over the axis "model" of the mesh,
    those called "row..." and "out" what they take (Shoeybi et al., 2019, Figure 3).

    Attributes:
      dropit: what the layers cache.
      features: of the input.
      rows: in Explicit mode, how the batch is sharded, for the layers whose result JAX
        does not know how to shard.
      columns: likewise, and over what the channels are.
    """

    dropit: DropIT | None
    features: int
    rows: tuple[str | None] | None = None
    columns: tuple[str | None, str | None] | None = None

    def row(self, operation, rank):
        """An operation that sums over channels that are sharded."""
        if self.rows is None:
            return operation
        spec = P(*self.rows, *[None] * (rank - 1))
        return functools.partial(operation, out_sharding=spec)

    def column_conv(self):
        """A convolution that gives channels that are sharded."""
        if self.columns is None:
            return lax.conv_general_dilated
        batch, channels = self.columns
        spec = P(batch, None, None, channels)
        return functools.partial(lax.conv_general_dilated, out_sharding=spec)


class Denses(Model):
    @nn.compact
    def __call__(self, x):
        dense = functools.partial(dn.Dense, self.features, dropit=self.dropit)
        x = nn.tanh(dense(name="column")(x))
        return dense(dot_general=self.row(lax.dot_general, x.ndim), name="row")(x)


class Vectors(Denses):
    """Samples so short that their last chunk may be shorter still."""

    @nn.compact
    def __call__(self, x):
        return super().__call__(x[:, 0])


class GeneralDenses(Model):
    @nn.compact
    def __call__(self, x):
        heads = (_DEVICES, self.features // _DEVICES)
        x = dn.DenseGeneral(heads, dropit=self.dropit, name="column")(x)
        return dn.DenseGeneral(
            self.features,
            axis=(-2, -1),
            dot_general=self.row(lax.dot_general, 3),
            dropit=self.dropit,
            name="row",
        )(nn.tanh(x))


class Convs(Model):
    @nn.compact
    def __call__(self, x):
        conv = functools.partial(dn.Conv, self.features, (3, 3), dropit=self.dropit)
        column = self.column_conv()
        x = conv(strides=2, conv_general_dilated=column, name="column")(_as_images(x))
        row = self.row(lax.conv_general_dilated, 4)
        return conv(conv_general_dilated=row, name="row")(nn.tanh(x))


class ResNet(Model):
    """A block with a stride, and so with all that a block may have."""

    @nn.compact
    def __call__(self, x):
        x = _as_images(x)
        conv = functools.partial(
            dn.Conv, self.features, use_bias=False, dropit=self.dropit
        )
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        column = self.column_conv()
        row = self.row(lax.conv_general_dilated, 4)
        y = dropit_jax.nn.relu(norm()(x))
        y = conv((3, 3), 2, conv_general_dilated=column, name="column")(y)
        y = dropit_jax.nn.relu(norm()(y))
        y = conv((3, 3), conv_general_dilated=row, name="row")(y)
        x = conv((1, 1), 2, conv_general_dilated=row, name="shortcut")(x) + y
        return dn.Dense(8, dropit=self.dropit, name="head")(x.mean((1, 2)))


class ViT(Model):
    """Attention of a block; its MLP is `Denses`."""

    @nn.compact
    def __call__(self, x):
        row = self.row(lax.dot_general, 3)
        y = nn.LayerNorm()(x)
        x += dn.MultiHeadDotProductAttention(
            _DEVICES, out_dot_general=row, dropit=self.dropit, name="attention"
        )(y)
        return dn.Dense(8, dropit=self.dropit, name="head")(x.mean(1))


def _as_images(x):
    return x.reshape(x.shape[0], 4, 4, x.shape[-1])


_MODELS = {
    "dense": Denses,
    "vectors": Vectors,
    "dense_general": GeneralDenses,
    "conv": Convs,
    "resnet": ResNet,
    "vit": ViT,
}
# How many activations are cached whose features are sharded over "model".
SHARDED_ACTIVATIONS = {
    "dense": 1,
    "vectors": 1,
    "dense_general": 1,
    "conv": 1,
    "resnet": 1,
    "vit": 1,
}


def _replicated(path, shape):
    return P()


def _fully_sharded(path, shape):
    """Every parameter along its largest axis that the devices divide."""
    axes = [i for i, size in enumerate(shape) if size % _DEVICES == 0]
    if not axes:
        return P()
    largest = max(axes, key=lambda i: shape[i])
    return P(*["data" if i == largest else None for i in range(len(shape))])


def _tensor(path, shape):
    layer, kind = path[-2:]
    if layer in ("query", "key", "value") or layer.startswith("column"):
        axis = -2 if len(shape) - (kind == "kernel") == 2 else -1
    elif kind == "kernel" and (layer == "out" or layer.startswith("row")):
        axis = 0 if len(shape) == 3 else -2
    else:
        return P()
    return P(*["model" if i == axis % len(shape) else None for i in range(len(shape))])


# (shape of the mesh, over what the batch is sharded, how parameters are)
MESHES = {
    "data": ({"data": _DEVICES}, "data", _replicated),
    "fsdp": ({"data": _DEVICES}, "data", _fully_sharded),
    "tensor": ({"model": _DEVICES}, None, _tensor),
    "data_tensor": ({"data": 4, "model": 2}, "data", _tensor),
}


def _collectives(compiled):
    return collections.Counter(_COLLECTIVE.findall(compiled.as_text()))


def _paths(tree):
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: tuple(key.key for key in path), tree
    )


def _input(features):
    return jnp.asarray(np.random.default_rng(0).normal(size=(8, 16, features)))


@functools.cache
def _variables(model, features):
    """Numbers as of an initialisation, which need not be compiled."""
    init = _MODELS[model](None, features).init
    shapes = jax.eval_shape(init, jax.random.key(1), _input(features))
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        if path[-1].key == "kernel":
            return rng.normal(size=leaf.shape) / features**0.5
        start = 1 if path[-1].key in ("scale", "var") else 0
        return start + rng.uniform(0, 0.1, leaf.shape)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def _gradient(model, variables):
    """The gradient of a loss in the parameters and the input."""

    def loss(params, x):
        return jnp.sum(jnp.cos(model.apply({**variables, "params": params}, x)))

    return jax.grad(loss, argnums=(0, 1))


@functools.cache
def on_one_device(model, features, policy):
    variables = _variables(model, features)
    gradient = _gradient(_MODELS[model](policy, features), variables)
    compiled = jax.jit(gradient)
    return jax.device_get(compiled(variables["params"], _input(features)))


@functools.cache
def on_mesh(model, features, policy, mesh_name, axis_type):
    """The collectives of the gradient, and its values."""
    axes, batch, spec = MESHES[mesh_name]
    mesh = jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=(axis_type,) * len(axes)
    )
    variables = _variables(model, features)
    params = jax.tree.map(
        lambda p, path: jax.device_put(p, NamedSharding(mesh, spec(path, p.shape))),
        variables["params"],
        _paths(variables["params"]),
    )
    x = jax.device_put(_input(features), NamedSharding(mesh, P(batch)))
    explicit = axis_type == AxisType.Explicit
    known = ((batch,), (batch, "model" if "model" in axes else None))
    sharded = _MODELS[model](policy, features, *(known if explicit else (None, None)))
    gradient = _gradient(sharded, variables)
    if explicit and mesh_name == "fsdp":  # Explicit mode gathers nothing by itself
        sharded_gradient = gradient

        def gradient(params, x):
            whole = jax.tree.map(lambda p: jax.sharding.reshard(p, P()), params)
            return sharded_gradient(whole, x)

    shardings = jax.tree.map(lambda a: a.sharding, (params, x))
    compiled = jax.jit(gradient, out_shardings=shardings)
    with jax.set_mesh(mesh):
        compiled = compiled.lower(params, x).compile()
        return _collectives(compiled), jax.device_get(compiled(params, x))
