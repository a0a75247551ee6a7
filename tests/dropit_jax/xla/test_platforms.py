"""Functions that are computed in another way on some platforms."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dropit_jax.xla.platforms import by_platform


def _default(x, y):
    return {"sum": jnp.sin(x) + y, "larger": x > y}


def _alike(x, y):
    """The same results, by an operation that tells where it came from."""
    return {"sum": jnp.tan(x) * jnp.cos(x) + y, "larger": x > y}


class ByPlatformTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        x, y = np.random.default_rng(0).normal(size=(2, 4, 5)).astype("float32")
        self.x, self.y = jnp.asarray(x), jnp.asarray(y)

    @parameterized.parameters(True, False)
    def test_is_the_default(self, jitted):
        operation = by_platform(_default, cuda=_alike)
        operation = jax.jit(operation) if jitted else operation
        chex.assert_trees_all_equal(operation(self.x, self.y), _default(self.x, self.y))

    def test_without_jit_it_is_the_default(self):
        operation = by_platform(_default, cpu=_alike)
        with jax.disable_jit():
            found = operation(self.x, self.y)
        chex.assert_trees_all_close(found, _default(self.x, self.y), rtol=1e-6)

    @parameterized.parameters(("cpu", "tan"), ("cuda", "sine"), ("rocm", "sine"))
    def test_is_what_is_given_for_the_platform(self, platform, expected):
        operation = jax.jit(by_platform(_default, cpu=_alike))
        traced = operation.trace(self.x, self.y)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        self.assertIn(f"stablehlo.{expected}", text)
        self.assertNotIn("stablehlo.case", text)

    def test_one_program_may_be_for_several_platforms(self):
        operation = jax.jit(by_platform(_default, cpu=_alike))
        traced = operation.trace(self.x, self.y)
        text = traced.lower(lowering_platforms=("cpu", "cuda")).as_text()
        self.assertIn("stablehlo.tan", text)
        self.assertIn("stablehlo.sine", text)

    @parameterized.parameters((1, "tan"), (8, "cosine"))
    def test_one_device_may_have_its_own(self, devices, expected):
        operation = by_platform(
            _default,
            cpu=lambda x, y: {"sum": jnp.cos(x) + y, "larger": x > y},
            one_cpu=lambda x, y: {"sum": jnp.tan(x) + y, "larger": x > y},
        )
        sharding = NamedSharding(jax.make_mesh((devices,), ("data",)), PartitionSpec())
        jitted = jax.jit(operation, in_shardings=sharding)
        text = jitted.lower(self.x, self.y).as_text()
        found = re.findall(r"stablehlo\.(sine|cosine|tan)\b", text)
        self.assertEqual(found, [expected])

    def test_what_is_given_is_what_runs(self):
        operation = by_platform(_default, cpu=lambda x, y: _default(x + 1, y))
        chex.assert_trees_all_equal(
            operation(self.x, self.y), _default(self.x + 1, self.y)
        )

    @parameterized.parameters(((0, 0),), ((1, None),), ((None, 1),))
    def test_can_be_mapped(self, axes):
        x = self.x if axes[0] is not None else self.x[0, 0]
        y = self.y if axes[1] is not None else self.y[0, 0]
        for function in (by_platform(_default, cpu=_alike), by_platform(_default)):
            chex.assert_trees_all_close(
                jax.jit(jax.vmap(function, axes))(x, y),
                jax.vmap(_default, axes)(x, y),
                atol=1e-6,
            )

    def test_has_the_derivatives_of_the_default(self):
        def total(function):
            return lambda x, y: jnp.sum(function(x, y)["sum"] ** 2)

        operation = by_platform(_default, cpu=lambda x, y: _default(x + 1, y))
        for transform in (
            lambda f: jax.grad(f, argnums=(0, 1)),
            jax.hessian,
            lambda f: jax.grad(jax.checkpoint(f)),
        ):
            chex.assert_trees_all_close(
                jax.jit(transform(total(operation)))(self.x, self.y),
                transform(total(_default))(self.x, self.y),
                atol=1e-5,
            )

    def test_of_what_is_not_differentiated_what_is_given_runs(self):
        operation = by_platform(_default, cpu=lambda x, y: _default(x + 1, y))
        gradient = jax.grad(
            lambda y: jnp.sum(y * operation(self.x, self.y)["sum"]), allow_int=True
        )
        chex.assert_trees_all_close(gradient(self.y), jnp.sin(self.x + 1) + self.y)

    def test_keeps_an_explicit_sharding(self):
        mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))
        with jax.sharding.set_mesh(mesh):
            x = jax.device_put(self.x, jax.P("data"))
            given = jax.jit(by_platform(_default, cpu=_alike))(x, x)
            for leaf in jax.tree.leaves(given):
                self.assertEqual(jax.typeof(leaf).sharding.spec, jax.P("data", None))


if __name__ == "__main__":
    absltest.main()
