"""On meshes of eight devices: the collectives of Flax, and the gradients of one device.

Where this process has fewer devices, the tests run in one that has eight.
"""

import collections
import functools
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import dropit_jax
from dropit_jax import DropIT
from dropit_jax import linen as dn

_DEVICES = 8
_FLAG = f"--xla_force_host_platform_device_count={_DEVICES}"
_COLLECTIVE = re.compile(
    r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)


class Denses(nn.Module):
    """Two layers, the second of which may be sharded along what it sums over."""

    dropit: DropIT | None
    features: int

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(dn.Dense(self.features, dropit=self.dropit, name="column")(x))
        return dn.Dense(self.features, dropit=self.dropit, name="row")(x)


class GeneralDenses(nn.Module):
    dropit: DropIT | None
    features: int

    @nn.compact
    def __call__(self, x):
        heads = (_DEVICES, self.features // _DEVICES)
        x = dn.DenseGeneral(heads, dropit=self.dropit, name="column")(x)
        row = dn.DenseGeneral(
            self.features, axis=(-2, -1), dropit=self.dropit, name="row"
        )
        return row(nn.tanh(x))


class Convs(nn.Module):
    dropit: DropIT | None
    features: int

    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], 4, 4, x.shape[-1])
        conv = functools.partial(dn.Conv, self.features, (3, 3), dropit=self.dropit)
        return conv(name="row")(nn.tanh(conv(strides=2, name="column")(x)))


class ResNet(nn.Module):
    """Two blocks, the second with a stride."""

    dropit: DropIT | None
    features: int

    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], 4, 4, x.shape[-1])
        conv = functools.partial(
            dn.Conv, self.features, use_bias=False, dropit=self.dropit
        )
        for strides in (1, 2):
            y = nn.BatchNorm(use_running_average=True)(x)
            y = conv((3, 3), strides, name=f"column{strides}")(dropit_jax.nn.relu(y))
            y = nn.BatchNorm(use_running_average=True)(y)
            y = conv((3, 3), name=f"row{strides}")(dropit_jax.nn.relu(y))
            x = y + (x if strides == 1 else conv((1, 1), 2, name="row")(x))
        return dn.Dense(8, dropit=self.dropit, name="row_head")(x.mean((1, 2)))


class ViT(nn.Module):
    """Two blocks."""

    dropit: DropIT | None
    features: int

    @nn.compact
    def __call__(self, x):
        dense = functools.partial(dn.Dense, dropit=self.dropit)
        for block in range(2):
            y = nn.LayerNorm()(x)
            x += dn.MultiHeadDotProductAttention(
                _DEVICES, dropit=self.dropit, name=f"attention{block}"
            )(y)
            y = nn.LayerNorm()(x)
            y = nn.gelu(dense(2 * self.features, name=f"column{block}")(y))
            x += dense(self.features, name=f"row{block}")(y)
        return dense(8, name="head")(x.mean(1))


_MODELS = {
    "dense": Denses,
    "dense_general": GeneralDenses,
    "conv": Convs,
    "resnet": ResNet,
    "vit": ViT,
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
    """Columns, then rows (Shoeybi et al., 2019, Figure 3)."""
    layer, kind = path[-2:]
    if layer in ("query", "key", "value", "column") or layer.startswith("column"):
        axis = -2 if len(shape) - (kind == "kernel") == 2 else -1
    elif kind == "kernel" and (layer == "out" or layer.startswith("row")):
        axis = 0 if len(shape) == 3 else -2
    else:
        return P()
    return P(*["model" if i == axis % len(shape) else None for i in range(len(shape))])


# (shape of the mesh, how the batch is sharded, how parameters are)
_MESHES = {
    "data": ({"data": _DEVICES}, P("data"), _replicated),
    "fsdp": ({"data": _DEVICES}, P("data"), _fully_sharded),
    "tensor": ({"model": _DEVICES}, P(), _tensor),
    "data_tensor": ({"data": 4, "model": 2}, P("data"), _tensor),
}


def _mesh(axes, axis_type):
    return jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=(axis_type,) * len(axes)
    )


def _collectives(compiled):
    return collections.Counter(_COLLECTIVE.findall(compiled.as_text()))


def _paths(tree):
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: tuple(key.key for key in path), tree
    )


def _data(features):
    x = jax.random.normal(jax.random.key(0), (32, 16, features))
    return jnp.asarray(np.asarray(x))


class Case:
    """The gradient of a model's loss, on one device and on a mesh."""

    def __init__(self, model, features, policy):
        self.x = _data(features)
        self.model = _MODELS[model](policy, features)
        plain = _MODELS[model](None, features)
        variables = jax.jit(plain.init)(jax.random.key(1), self.x)
        self.params = variables["params"]
        self.rest = {k: v for k, v in variables.items() if k != "params"}

    def loss(self, params, x):
        out = self.model.apply({"params": params, **self.rest}, x)
        return jnp.sum(jnp.cos(out))

    def on_one_device(self):
        return jax.jit(jax.grad(self.loss, argnums=(0, 1)))(self.params, self.x)

    def on_mesh(self, mesh_name, axis_type):
        """The compiled gradient, and its values."""
        axes, batch, spec = _MESHES[mesh_name]
        mesh = _mesh(axes, axis_type)
        params = jax.tree.map(
            lambda p, path: jax.device_put(p, NamedSharding(mesh, spec(path, p.shape))),
            self.params,
            _paths(self.params),
        )
        x = jax.device_put(self.x, NamedSharding(mesh, batch))

        def loss(params, x):
            if mesh_name == "fsdp" and axis_type == AxisType.Explicit:
                # Explicit mode gathers nothing of its own accord.
                params = jax.tree.map(lambda p: jax.sharding.reshard(p, P()), params)
            return self.loss(params, x)

        shardings = jax.tree.map(lambda a: a.sharding, (params, x))
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), out_shardings=shardings)
        with jax.set_mesh(mesh):
            compiled = gradient.lower(params, x).compile()
            return compiled, compiled(params, x)


_SMALL = DropIT(0.75)
_BITMAP = DropIT(0.5, encoding="bitmap")
_LARGE = DropIT(0.8, chunk_size=2**14)


class ModelTest(parameterized.TestCase):
    @parameterized.product(
        model=tuple(_MODELS),
        mesh=("data", "fsdp"),
        axis_type=(AxisType.Auto, AxisType.Explicit),
        features=(128, 72),
    )
    def test_batch_sharded(self, model, mesh, axis_type, features):
        flax, _ = Case(model, features, None).on_mesh(mesh, axis_type)
        for policy in (_SMALL, _BITMAP, _LARGE):
            case = Case(model, features, policy)
            compiled, gradients = case.on_mesh(mesh, axis_type)
            if _collectives(compiled) != _collectives(flax):
                print(
                    "BAD",
                    model,
                    mesh,
                    axis_type,
                    features,
                    policy.chunk_size,
                    policy.encoding,
                    dict(_collectives(compiled)),
                    dict(_collectives(flax)),
                )
            chex.assert_trees_all_close(
                gradients, case.on_one_device(), rtol=1e-4, atol=1e-4
            )

    @parameterized.product(
        model=tuple(_MODELS), mesh=("tensor", "data_tensor"), features=(128, 72)
    )
    def test_feature_sharded(self, model, mesh, features):
        flax, _ = Case(model, features, None).on_mesh(mesh, AxisType.Auto)
        for policy in (_SMALL, _BITMAP, _LARGE):
            case = Case(model, features, policy)
            compiled, gradients = case.on_mesh(mesh, AxisType.Auto)
            if _collectives(compiled) != _collectives(flax):
                print(
                    "BAD",
                    model,
                    mesh,
                    features,
                    policy.chunk_size,
                    policy.encoding,
                    dict(_collectives(compiled)),
                    dict(_collectives(flax)),
                )
            chex.assert_trees_all_close(
                gradients, case.on_one_device(), rtol=1e-4, atol=1e-4
            )


if __name__ == "__main__":
    absltest.main()
