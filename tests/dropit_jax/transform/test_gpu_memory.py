"""What a plan stores is what a GPU's step allocates, but for a layer at work."""

import jax
from absl.testing import absltest, parameterized

from dropit_jax import drop, memory, plan
from tests.dropit_jax.transform.small_models import MODELS, X

# What a layer works with: operands of products, and with the oldest JAX a workspace of
# cuBLAS of 32 MiB.
_WORK = 60 * 2**20


# Layers of which the product of two branches is stored beside both by JAX.
_GATED = ("geglu", "sigmoid_gate", "swiglu")


def _temp_bytes(loss, params):
    report = memory.compile_report(jax.grad(loss), params, X, target="h100")
    return report.temp_bytes


class GpuMemoryTest(parameterized.TestCase):
    @parameterized.named_parameters((name, name) for name in MODELS)
    def test_the_step_takes_what_the_plan_says(self, name):
        loss, params = MODELS[name]
        planned = plan(loss)(params, X)
        dropped = _temp_bytes(drop(loss), params)
        self.assertBetween(dropped, planned.nbytes, planned.nbytes + _WORK)
        if name in _GATED:
            self.assertLess(dropped, _temp_bytes(loss, params))


if __name__ == "__main__":
    absltest.main()
