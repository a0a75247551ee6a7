"""The text of a program depends on the function alone, not on what came before it.

Else a cache of compiled programs misses, and processes of one run lower other programs.
"""

import re

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dropit_jax import drop
from tests.dropit_jax.operations import OPERATIONS
from tests.dropit_jax.transform.features import FEATURES, PARAMS, X


def _text(function, arguments, batched, platform):
    """Of the gradient on two devices, which share the argument that is batched."""
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,))
    placed = [
        jax.device_put(
            argument, NamedSharding(mesh, P("batch") if i == batched else P())
        )
        for i, argument in enumerate(arguments)
    ]

    def loss(*arrays):
        return jnp.sum(jnp.sin(function(*arrays)))

    traced = jax.jit(jax.grad(loss)).trace(*placed)
    return _ADDRESS.sub("", traced.lower(lowering_platforms=(platform,)).as_text())


# JAX writes where the rule of `custom_partitioning` lies in memory; with
# `jax_remove_custom_partitioning_ptr_from_cache_key` its cache looks past it.
_ADDRESS = re.compile(r'(?<=api_version = 2 : i32, )backend_config = "\d+"')


class LoweredTextTest(parameterized.TestCase):
    @parameterized.parameters("cpu", "cuda")
    def test_of_operations(self, platform):
        def texts():
            return {
                name: _text(operation.own, operation.arguments("float32"), 0, platform)
                for name, operation in OPERATIONS.items()
            }

        first, second = texts(), texts()
        for name, text in first.items():
            self.assertEqual(text, second[name], name)

    @parameterized.product(
        name=("mlp", "scan", "convolved", "checkpointed_blocks", "dropit_layer"),
        preset=("exact", "lean"),
    )
    def test_of_dropped_functions(self, name, preset):
        def text():
            return _text(drop(FEATURES[name], preset), (PARAMS, X), 1, "cpu")

        first = text()
        jax.clear_caches()
        self.assertEqual(first, text())


if __name__ == "__main__":
    absltest.main()
