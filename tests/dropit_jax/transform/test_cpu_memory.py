"""A step on one CPU allocates what is stored, not the plain values."""

from importlib import metadata

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

from dropit_jax import drop

# Before JAX 0.12 XLA's CPU compiler does not order operations by barriers.
_VERSION = tuple(map(int, metadata.version("jaxlib").split(".")[:2]))
_HEEDS_BARRIERS = _VERSION >= (0, 12)
_LAYERS, _BATCH, _WIDTH = 8, 512, 64


def _loss(params, x):
    for first, second in params:
        x = x + jax.nn.gelu(x @ first) @ second
    return jnp.mean(x**2)


def _temp_bytes(loss, *arguments):
    compiled = jax.jit(jax.grad(loss)).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


class CpuMemoryTest(parameterized.TestCase):
    @parameterized.parameters(("exact", 0.6), ("lean", 0.25), ("leanest", 0.15))
    def test_a_step_takes_less(self, preset, share):
        weight = jax.ShapeDtypeStruct((_WIDTH, _WIDTH), jnp.float32)
        x = jax.ShapeDtypeStruct((_BATCH, _WIDTH), jnp.float32)
        arguments = [(weight, weight)] * _LAYERS, x
        plain = _temp_bytes(_loss, *arguments)
        dropped = _temp_bytes(drop(_loss, preset), *arguments)
        self.assertLess(dropped, (share if _HEEDS_BARRIERS else 1.1) * plain)


if __name__ == "__main__":
    absltest.main()
