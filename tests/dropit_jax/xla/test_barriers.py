"""Barriers keep XLA from computing early, on the platforms that need them."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dropit_jax.xla.barriers import (
    barrier,
    barrier_of_passes,
    call_after,
    read_after,
)
from dropit_jax.xla.partitioning import any_element


def _lowered(function, *args, platform):
    traced = jax.jit(function).trace(*args)
    return traced.lower(lowering_platforms=(platform,)).as_text()


class BarrierTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        x, y = np.random.default_rng(0).normal(size=(2, 4, 5)).astype("float32")
        self.tree = {"x": jnp.asarray(x), "y": (jnp.asarray(y),)}

    @parameterized.parameters(True, False)
    def test_gives_what_it_is_given(self, jitted):
        function = jax.jit(barrier) if jitted else barrier
        chex.assert_trees_all_equal(function(self.tree), self.tree)

    def test_takes_keys_and_integers(self):
        tree = (jax.random.key(0), jnp.arange(3))
        key, numbers = jax.jit(barrier)(tree)
        chex.assert_trees_all_equal(numbers, tree[1])
        chex.assert_trees_all_equal(*map(jax.random.key_data, (key, tree[0])))

    @parameterized.parameters(("cpu", 0), ("cuda", 1), ("rocm", 1))
    def test_is_one_but_on_a_cpu(self, platform, count):
        text = _lowered(barrier, self.tree, platform=platform)
        self.assertEqual(text.count("stablehlo.optimization_barrier"), count)

    @parameterized.product(platform=("cpu", "cuda"), devices=(1, 8))
    def test_that_of_passes_is_one_but_on_several_cpus(self, platform, devices):
        mesh = jax.make_mesh((devices,), ("data",))
        replicated = NamedSharding(mesh, P())
        text = _lowered(
            barrier_of_passes,
            jax.device_put(self.tree, replicated),
            platform=platform,
        )
        count = 0 if platform == "cpu" and devices > 1 else 1
        self.assertEqual(text.count("stablehlo.optimization_barrier"), count)

    def test_is_linear(self):
        def total(tree):
            tree = barrier(tree)
            return jnp.sum(tree["x"] ** 2 * tree["y"][0])

        def plain(tree):
            return jnp.sum(tree["x"] ** 2 * tree["y"][0])

        for transform in (jax.grad, jax.hessian, lambda f: jax.grad(jax.checkpoint(f))):
            chex.assert_trees_all_close(
                jax.jit(transform(total))(self.tree), transform(plain)(self.tree)
            )

    def test_keeps_apart_what_is_mapped_and_what_is_not(self):
        def pair(x, y):
            return barrier((x, y))

        x, y = self.tree["x"], self.tree["y"][0]
        mapped = jax.vmap(pair, in_axes=(1, None), out_axes=(1, None))
        chex.assert_trees_all_equal(jax.jit(mapped)(x, y), (x, y))


class ReadAfterTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        x, y = np.random.default_rng(0).normal(size=(2, 4, 5)).astype("float32")
        self.tree = {"x": jnp.asarray(x), "codes": (jnp.arange(3),)}
        self.y = jnp.asarray(y)

    @parameterized.product(jitted=(True, False), shape=((4, 5), (), (0, 3), (1, 1, 1)))
    def test_gives_what_it_is_given(self, jitted, shape):
        function = jax.jit(read_after) if jitted else read_after
        for tree in (self.tree, (), None):
            chex.assert_trees_all_equal(function(jnp.ones(shape), tree), tree)

    @parameterized.parameters(("cpu", []), ("cuda", [""]), ("rocm", ["4x5x"]))
    def test_what_is_to_be_in_memory(self, platform, expected):
        text = _lowered(read_after, self.y, self.tree["codes"], platform=platform)
        barriers = re.findall(
            r"optimization_barrier .* : tensor<3xi32>, tensor<(.*)f32>", text
        )
        self.assertEqual(barriers, expected)

    def test_has_no_gradient_for_what_is_waited_for(self):
        def total(x, y):
            return jnp.sum(jnp.sin(read_after(y, x)))

        x = self.tree["x"]
        gradients = jax.jit(jax.grad(total, argnums=(0, 1)))(x, self.y)
        chex.assert_trees_all_close(gradients[0], jnp.cos(x))
        chex.assert_trees_all_equal(gradients[1], jnp.zeros_like(self.y))

    @parameterized.parameters(((0, None),), ((None, 1),), ((1, 1),))
    def test_can_be_mapped(self, axes):
        mapped = jax.vmap(lambda x, y: read_after(y, x) * 2, axes)
        expected = jax.vmap(lambda x, y: x * 2, axes)
        args = (self.tree["x"], self.y)
        chex.assert_trees_all_equal(jax.jit(mapped)(*args), expected(*args))
        traced = jax.jit(mapped).trace(*args)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        self.assertEqual(text.count("optimization_barrier"), 1)


class AnyElementTest(parameterized.TestCase):
    @parameterized.product(
        spec=(P("data"), P(None, "model"), P(("data", "model"))),
        axis_type=(AxisType.Auto, AxisType.Explicit),
    )
    def test_nothing_moves(self, spec, axis_type):
        @jax.jit
        def step(x):
            y = 2 * x
            y, element = lax.optimization_barrier((y, any_element(y)))
            return y, element

        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
        x = np.arange(64, dtype="float32").reshape(8, 8)
        with jax.set_mesh(mesh):
            sharded = jax.device_put(x, NamedSharding(mesh, spec))
            compiled = step.lower(sharded).compile()
            y, element = compiled(sharded)
        self.assertNotRegex(compiled.as_text(), "all-|reduce-scatter|collective")
        self.assertTrue(y.sharding.is_equivalent_to(sharded.sharding, y.ndim))
        firsts = [float(part.data.ravel()[0]) for part in y.addressable_shards]
        found = [float(part.data) for part in element.addressable_shards]
        self.assertEqual(found, firsts)

    def test_of_each_part_within_shard_map(self):
        mesh = jax.make_mesh((8,), ("data",))
        run = jax.shard_map(
            lambda x: any_element(x)[None],
            mesh=mesh,
            in_specs=P("data"),
            out_specs=P("data"),
        )
        x = jax.device_put(jnp.arange(16.0), NamedSharding(mesh, P("data")))
        chex.assert_trees_all_equal(np.asarray(jax.jit(run)(x)), np.arange(0, 16.0, 2))


class ComputedAfterTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        x, y = np.random.default_rng(0).normal(size=(2, 64, 64)).astype("float32")
        self.x, self.y = jnp.asarray(x), jnp.asarray(y)

    @parameterized.parameters(True, False)
    def test_is_the_function(self, jitted):
        def run(first, x, y):
            return call_after(first, jnp.arctan2, x, y)

        run = jax.jit(run) if jitted else run
        for first in (self.x[:3], jnp.ones((1, 3, 1)), jnp.float32(jnp.nan), None):
            chex.assert_trees_all_equal(
                run(first, self.x, self.y), jax.jit(jnp.arctan2)(self.x, self.y)
            )

    def test_waits_on_a_cpu(self):
        def step(x, y):
            first = jnp.tanh(x @ x)
            return first, call_after(first, jnp.arctan2, x, y)

        text = jax.jit(step).lower(self.x, self.y).compile().as_text()
        (call,) = re.findall(r"= f32\[64,64\]\S* call\((.*?)\)", text)
        self.assertLen(call.split(", "), 3)

    def test_nothing_waits_elsewhere(self):
        def step(x, y):
            return call_after(x, jnp.sin, y)

        text = _lowered(step, self.x, self.y, platform="cuda")
        self.assertNotIn("call", text)
        self.assertIn("inlineable", _lowered(step, self.x, self.y, platform="cpu"))

    def test_what_is_waited_for_has_no_gradient(self):
        def total(first, x):
            return jnp.sum(call_after(first, jnp.sin, x))

        gradients = jax.jit(jax.grad(total, argnums=(0, 1)))(self.x, self.y)
        chex.assert_trees_all_equal(gradients[0], jnp.zeros_like(self.x))
        chex.assert_trees_all_close(gradients[1], jnp.cos(self.y), atol=1e-6)

    @parameterized.parameters(((0, None),), ((None, 1),), ((1, 0),))
    def test_can_be_mapped(self, axes):
        def run(first, x):
            return call_after(first, lambda x: jnp.cumsum(x, axis=0), x)

        given = jax.jit(jax.vmap(run, axes))(self.x, self.y)
        expected = jax.vmap(lambda first, x: jnp.cumsum(x, axis=0), axes)
        chex.assert_trees_all_close(given, expected(self.x, self.y), atol=1e-5)

    def test_what_is_not_mapped_is_computed_once_for_the_batch(self):
        def run(first, x):
            return call_after(first, jnp.sin, x).sum()

        shapes = jax.make_jaxpr(jax.vmap(run, (0, None)))(self.x, self.y)
        for equation in shapes.eqns:
            for result in equation.outvars:
                self.assertLessEqual(result.aval.size, self.y.size)


if __name__ == "__main__":
    absltest.main()
