import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from train.engine import finite


def _state(value, dtype, sharding=None):
    array = np.ones((8, 2), dtype)
    array[5, 1] = value
    whole = {"kernel": jnp.ones(3), "step": jnp.int32(2**31 - 1), "flag": jnp.bool_(1)}
    bad = jax.device_put(jnp.asarray(array), sharding)
    return {"params": whole | {"bias": bad}, "rng": jnp.zeros(2, jnp.uint32)}


class FiniteTest(parameterized.TestCase):
    @parameterized.product(
        value=(np.nan, np.inf, -np.inf), dtype=("float32", "bfloat16", "float16")
    )
    def test_names_what_is_not_finite(self, value, dtype):
        problem = finite.problem(_state(value, dtype))
        self.assertEqual(
            problem, "params/bias became infinite, NaN, or larger than 1e19"
        )

    @parameterized.parameters(2e19, -3e38)
    def test_names_what_is_too_large_to_go_on(self, value):
        problem = finite.problem(_state(value, "float32"))
        self.assertIn("params/bias became", problem)
        with np.errstate(over="ignore"):
            self.assertTrue(np.isinf(np.square(np.float32(value))))

    @parameterized.parameters(0.0, -0.0, 1e-40, 1.8e19)
    def test_all_else_is_finite(self, value):
        self.assertEqual(finite.problem(_state(value, "float32")), "")
        self.assertEqual(finite.problem({}), "")

    def test_one_element_on_one_device_counts(self):
        mesh = jax.make_mesh((8,), ("x",))
        state = _state(np.nan, "float32", NamedSharding(mesh, P("x")))
        self.assertIn("params/bias", finite.problem(state))

    def test_a_few_names_do(self):
        state = {f"w{i}": jnp.array(jnp.nan) for i in range(6)}
        expected = (
            "w0, w1, w2 and 3 more arrays became infinite, NaN, or larger than 1e19"
        )
        self.assertEqual(finite.problem(state), expected)


if __name__ == "__main__":
    absltest.main()
