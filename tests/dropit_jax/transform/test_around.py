"""`drop` inside of JAX's transformations, and what it may be given."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax import export
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from dropit_jax import drop, plan
from tests.dropit_jax.transform.comparing import error, primitives
from tests.dropit_jax.transform.features import FEATURES, PARAMS, X


def _gradient(function):
    return jax.jit(jax.value_and_grad(function, argnums=(0, 1)))(PARAMS, X)


def _mean_of(function):
    """The mean over a mapped axis, of what a collective has a part in."""

    def mean(params, x):
        scale = jax.lax.psum(jnp.sum(jnp.tanh(x)), "rows")
        return jax.lax.pmean(function(params, x) * scale, "rows")

    return mean


class AroundTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.function = FEATURES["mlp"]
        self.dropped = drop(self.function, "exact")

    def _assert_same(self, transform, *args):
        found, expected = (
            jax.jit(transform(function))(*args)
            for function in (self.dropped, self.function)
        )
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)

    def test_argnums(self):
        for argnums in (1, (1, 0)):
            self._assert_same(lambda f, a=argnums: jax.grad(f, argnums=a), PARAMS, X)

    def test_auxiliary_output(self):
        def with_aux(function):
            return lambda p, x: (function(p, x), {"x": jnp.sin(x), "n": 3})

        found, expected = (
            jax.jit(jax.grad(function, has_aux=True))(PARAMS, X)
            for function in (
                drop(with_aux(self.function), "exact"),
                with_aux(self.function),
            )
        )
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)

    @parameterized.parameters(jax.checkpoint, jax.jit, functools.partial)
    def test_of_a_result_that_is_not_differentiated_nothing_is_computed(self, wrap):
        @wrap
        def block(p, x):
            y = jnp.tanh(x @ p["w"][0])
            return y, jnp.sin(y @ p["w"][1])

        def function(p, x):
            first, second = block(p, x)
            return jnp.sum(first**2), second

        found, expected = (
            jax.grad(f, has_aux=True)(PARAMS, X)
            for f in (drop(function, "exact"), function)
        )
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)

    def test_vjp_of_several_outputs(self):
        def outputs(p, x):
            return {"a": jnp.tanh(x @ p["w"][0]), "b": (x @ p["w"][1]) ** 2}

        for function in (outputs, drop(outputs, "exact")):
            value, pullback = jax.vjp(function, PARAMS, X)
            found = pullback(jax.tree.map(jnp.cos, value))
            if function is outputs:
                expected = found
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)

    def test_vmap_of_gradients(self):
        self._assert_same(
            lambda f: jax.vmap(jax.grad(f), (None, 0)), PARAMS, X.reshape(4, 2, 16)
        )

    def test_gradient_of_vmap(self):
        self._assert_same(
            lambda f: jax.grad(lambda p, x: jax.vmap(f, (None, 0))(p, x).sum()),
            PARAMS,
            X.reshape(4, 2, 16),
        )

    def test_scan_of_gradients(self):
        def accumulate(function):
            def turn(total, x):
                gradient = jax.grad(function)(PARAMS, x)
                return jax.tree.map(jnp.add, total, gradient), None

            zeros = jax.tree.map(jnp.zeros_like, PARAMS)
            return lambda xs: jax.lax.scan(turn, zeros, xs)[0]

        self._assert_same(accumulate, X.reshape(4, 2, 16))

    def test_checkpoint(self):
        self._assert_same(lambda f: jax.grad(jax.checkpoint(f)), PARAMS, X)

    def test_again(self):
        self._assert_same(lambda f: jax.grad(drop(f, "exact")), PARAMS, X)

    def test_vmap_with_collectives(self):
        self._assert_same(
            lambda f: jax.vmap(jax.grad(_mean_of(f)), (None, 0), axis_name="rows"),
            PARAMS,
            X.reshape(4, 2, 16),
        )

    @parameterized.named_parameters(
        ("of_gradients", lambda f, around: around(jax.grad(_mean_of(f)))),
        ("of_the_function", lambda f, around: jax.grad(around(_mean_of(f)))),
    )
    def test_shard_map(self, transform):
        mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Auto,))

        def around(function):
            return jax.shard_map(
                function, mesh=mesh, in_specs=(P(), P("rows")), out_specs=P()
            )

        self._assert_same(lambda f: transform(f, around), PARAMS, X)

    def test_a_jitted_step_that_is_given_its_parameters(self):
        def step(function):
            return jax.jit(
                lambda p, x: jax.tree.map(jnp.subtract, p, jax.grad(function)(p, x)),
                donate_argnums=0,
            )

        found, expected = (jax.tree.map(jnp.copy, PARAMS) for _ in range(2))
        plain, dropped = step(self.function), step(self.dropped)
        aliased = [
            one.lower(PARAMS, X).compile().memory_analysis().alias_size_in_bytes
            for one in (plain, dropped)
        ]
        self.assertGreater(aliased[0], 0)
        self.assertEqual(*aliased)
        for _ in range(2):
            given = found
            found, expected = dropped(found, X), plain(expected, X)
            self.assertTrue(all(leaf.is_deleted() for leaf in jax.tree.leaves(given)))
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)

    def test_an_inner_gradient_that_is_detached(self):
        def after_a_step(function):
            def outer(params, x):
                steps = jax.lax.stop_gradient(jax.grad(function)(params, x))
                moved = jax.tree.map(lambda p, s: p - 0.1 * s, params, steps)
                return function(moved, x)

            return jax.grad(outer)

        self._assert_same(after_a_step, PARAMS, X)
        lean, plain = (
            jax.jit(after_a_step(f))(PARAMS, X)
            for f in (drop(self.function, "lean"), self.function)
        )
        self.assertLess(error(lean, plain), 0.02)

    def test_detached_gradients_in_a_loop(self):
        def after_steps(function):
            def turn(params, _):
                steps = jax.lax.stop_gradient(jax.grad(function)(params, X))
                return jax.tree.map(lambda p, s: p - 0.1 * s, params, steps), None

            def outer(params):
                moved, _ = jax.lax.scan(turn, params, None, length=2)
                return function(moved, X)

            return jax.jit(jax.grad(outer))(PARAMS)

        plain = after_steps(self.function)
        for preset, bound in (("exact", 1e-5), ("lean", 0.02)):
            found = after_steps(drop(self.function, preset))
            self.assertLess(error(found, plain), bound, preset)

    @parameterized.parameters("lean", "leanest")
    def test_second_derivatives_raise(self, preset):
        gradient = jax.grad(drop(self.function, preset))

        def squared(params):
            return jnp.sum(gradient(params, X)["w"] ** 2)

        with pytest.raises(TypeError, match="drop made has no second derivative"):
            jax.make_jaxpr(jax.grad(squared))(PARAMS)
        with pytest.raises(TypeError, match="forward-mode"):
            jax.make_jaxpr(jax.jacfwd(lambda scale: gradient(PARAMS, scale * X)))(1.0)

    def test_second_derivatives_of_exact(self):
        def penalised(function):
            def squared(params):
                return jnp.sum(jax.grad(function)(params, X)["w"] ** 2)

            return jax.jit(jax.grad(squared))(PARAMS)

        found, expected = map(penalised, (self.dropped, self.function))
        self.assertLess(error(found, expected), 1e-5)

    def test_forward_mode_raises(self):
        for transform in (
            lambda f: jax.jvp(lambda x: f(PARAMS, x), (X,), (X,)),
            lambda f: jax.linearize(lambda x: f(PARAMS, x), X)[1](X),
            lambda f: jax.jacfwd(lambda scale: f(PARAMS, scale * X))(1.0),
        ):
            with pytest.raises(TypeError, match="forward-mode"):
                transform(self.dropped)

    def test_closed_over_values_are_differentiated(self):
        def of_closure(function):
            def outer(params, x):
                transformed = (drop if function is self.dropped else lambda f, _: f)(
                    lambda x: self.function(params, x), "exact"
                )
                return transformed(x)

            return jax.grad(outer, argnums=(0, 1))

        self._assert_same(of_closure, PARAMS, X)

    def test_static_arguments_are_given_as_they_are(self):
        def function(params, table, x):
            self.assertIsInstance(table, np.ndarray)
            return jnp.sum(jnp.tanh(x @ params["w"][int(table[0])]))

        table = np.array([2])
        for places in (1, (-2,)):
            dropped = drop(function, "exact", static_argnums=places)
            found = jax.grad(dropped)(PARAMS, table, X)
            expected = jax.grad(lambda p: function(p, table, X))(PARAMS)
            chex.assert_trees_all_close(found, expected, rtol=1e-6)
            self.assertGreater(plan(dropped)(PARAMS, table, X).nbytes, 0)
        with pytest.raises(ValueError, match="static_argnums=3: there are 2"):
            drop(self.function, static_argnums=3)(PARAMS, X)

    def test_what_is_no_array_passes_through(self):
        def function(params, x, *, activation, train, rate=0.5):
            y = activation(x @ params["w"][0])
            return jnp.sum(y * rate if train else y)

        keywords = {"activation": jnp.tanh, "train": True}
        found, expected = (
            jax.grad(f)(PARAMS, X, **keywords)
            for f in (drop(function, "exact"), function)
        )
        chex.assert_trees_all_close(found, expected, rtol=1e-6)


class ExportTest(parameterized.TestCase):
    """A step is written down for other machines, and does the same there."""

    @parameterized.parameters(("convolved", "exact"), ("scan", "lean"))
    def test_a_step(self, name, preset):
        self._assert_same_when_read(drop(FEATURES[name], preset), X.shape)

    @parameterized.parameters(("softmax", "lean"), ("scan", "exact"))
    def test_a_batch_of_any_size(self, name, preset):
        shape = (*export.symbolic_shape("rows"), 16)
        self._assert_same_when_read(drop(FEATURES[name], preset), shape)

    def _assert_same_when_read(self, function, shape):
        gradient = jax.jit(jax.grad(function))
        exported = export.export(gradient, platforms=("cpu", "cuda"))(
            PARAMS, jax.ShapeDtypeStruct(shape, X.dtype)
        )
        read = export.deserialize(exported.serialize())
        self.assertEqual(read.platforms, ("cpu", "cuda"))
        chex.assert_trees_all_close(
            read.call(PARAMS, X), gradient(PARAMS, X), rtol=1e-4, atol=1e-5
        )


class FrozenTest(parameterized.TestCase):
    """Arguments that are not differentiated cost nothing."""

    @parameterized.parameters("exact", "lean")
    def test_adapters_of_frozen_weights(self, preset):
        frozen = PARAMS["w"]
        adapters = {"a": frozen[:, :, :2], "b": frozen[:, :2, :]}

        def function(frozen, adapters, x):
            for w, a, b in zip(frozen, adapters["a"], adapters["b"], strict=True):
                x = jax.nn.gelu(x @ w + (x @ a) @ b)
            return jnp.sum(x**2)

        args = frozen, adapters, X
        dropped = drop(function, preset)
        plain, found = (
            primitives(jax.make_jaxpr(jax.grad(f, argnums=1))(*args))["dot_general"]
            for f in (function, dropped)
        )
        self.assertEqual(found, plain)
        as_argument = plan(dropped, argnums=1)(*args)
        closed_over = plan(lambda adapters: function(frozen, adapters, X), preset)
        self.assertGreater(as_argument.nbytes, 0)
        self.assertEqual(as_argument.nbytes, closed_over(adapters).nbytes)

    @parameterized.parameters("exact", "lean")
    def test_frozen_layers_below(self, preset):
        def function(frozen, w, x):
            for each in frozen:
                x = jnp.tanh(x @ each)
            return jnp.sum(jnp.tanh(x @ w) ** 2)

        w = PARAMS["w"]
        shallow, deep = (
            plan(function, preset, argnums=1)(w[:depth], w[0], X).nbytes
            for depth in (1, 3)
        )
        self.assertGreater(shallow, 0)
        self.assertEqual(deep, shallow)


if __name__ == "__main__":
    absltest.main()
