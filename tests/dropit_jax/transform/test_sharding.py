"""On meshes of eight devices: collectives and gradients are the plain function's."""

import collections
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dropit_jax.transform.drop import drop

_COLLECTIVE = re.compile(
    r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)
_RNG = np.random.default_rng(0)
# So many rows that weights are gathered, not activations; and groups of 64 channels
# are not shared by devices.
_X = _RNG.normal(size=(2048, 64))
_PARAMS = {
    "column": _RNG.normal(size=(64, 512)) / 8,
    "row": _RNG.normal(size=(512, 64)) / 8,
}


def _loss(params, x):
    for _ in range(2):
        hidden = jax.nn.gelu(x @ params["column"])
        x = x + hidden @ params["row"]
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return jnp.mean(jnp.sin(x))


# (shape of the mesh, over what the batch is sharded, and the two kernels)
_MESHES = {
    "data": ({"data": 8}, P("data"), P(), P()),
    "fsdp": ({"data": 8}, P("data"), P(None, "data"), P("data")),
    "tensor": ({"model": 8}, P(), P(None, "model"), P("model")),
    "data_tensor": (
        {"data": 4, "model": 2},
        P("data"),
        P(None, "model"),
        P("model"),
    ),
}


def _on_mesh(function, name):
    """The collectives of the gradient, and its values."""
    axes, *specs = _MESHES[name]
    mesh = jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes)
    )
    batch, column, row = (NamedSharding(mesh, spec) for spec in specs)
    shardings = {"column": column, "row": row}
    params = jax.device_put(jax.tree.map(jnp.asarray, _PARAMS), shardings)
    x = jax.device_put(jnp.asarray(_X), batch)
    gradient = jax.jit(jax.grad(function), out_shardings=shardings)
    compiled = gradient.lower(params, x).compile()
    found = collections.Counter(_COLLECTIVE.findall(compiled.as_text()))
    return found, jax.device_get(compiled(params, x))


class ShardingTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.enterContext(jax.enable_x64(True))

    @parameterized.parameters(*_MESHES)
    def test_moves_what_the_plain_function_does(self, mesh):
        plain, _ = _on_mesh(_loss, mesh)
        for preset in ("exact", "lean"):
            dropped = drop(_loss, preset)
            collectives, gradients = _on_mesh(dropped, mesh)
            self.assertEqual(collectives, plain, preset)
            alone = jax.jit(jax.grad(dropped))(_PARAMS, _X)
            chex.assert_trees_all_close(gradients, alone, rtol=1e-6, atol=1e-9)


if __name__ == "__main__":
    absltest.main()
