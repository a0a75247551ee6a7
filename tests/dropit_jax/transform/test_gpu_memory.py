"""What a plan stores is what a GPU's step allocates, layer by layer."""

import math

import jax
from absl.testing import absltest, parameterized

from dropit_jax import drop, memory, plan
from tests.dropit_jax.transform.small_models import MODELS, X, parameters

# Layers of which the product of two branches is stored beside both by JAX.
_GATED = ("geglu", "sigmoid_gate", "swiglu")
_FEW, _MORE = 2, 3


def _temp_bytes(loss, params):
    report = memory.compile_report(jax.grad(loss), params, X, target="h100")
    return report.temp_bytes


class GpuMemoryTest(parameterized.TestCase):
    @parameterized.named_parameters((name, name) for name in MODELS)
    def test_more_layers_take_what_the_plan_says(self, name):
        """What a layer works with and cuBLAS's workspace are alike for both depths."""
        loss, shapes = MODELS[name]
        few, more = (parameters(shapes, layers) for layers in (_FEW, _MORE))
        stored = plan(loss)(more, X).nbytes - plan(loss)(few, X).nbytes
        dropped = _temp_bytes(drop(loss), more)
        taken = dropped - _temp_bytes(drop(loss), few)
        # The gradients of weights may wait for the others of their array.
        weights = 4 * (_MORE - _FEW) * sum(math.prod(shape) for shape in shapes)
        self.assertBetween(taken, 0.9 * stored, 1.1 * stored + weights)
        if name in _GATED:
            self.assertLess(dropped, _temp_bytes(loss, more))


if __name__ == "__main__":
    absltest.main()
