import collections
import functools
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from dropit_jax import linen as dn
from dropit_jax.nn import norm_gradient, norms
from tests.dropit_jax import norm_cases, reference

_COLLECTIVE = re.compile(
    r" (all-[a-z]+|reduce-scatter|collective-permute)(?:-start)?\("
)


# (ours, Flax's)
_FUNCTIONS = (
    (norms.layer_norm, nn.LayerNorm()),
    (functools.partial(norms.layer_norm, epsilon=0.1), nn.LayerNorm(epsilon=0.1)),
    (norms.layer_norm, nn.LayerNorm(**norm_cases.PLAIN)),
    (norms.rms_norm, nn.RMSNorm()),
    (lambda x, **p: norms.group_norm(x, 4, **p), nn.GroupNorm(4)),
    (norms.batch_norm, nn.BatchNorm(**norm_cases.BATCH, momentum=0)),
)


class FunctionTest(parameterized.TestCase):
    @parameterized.parameters(*_FUNCTIONS)
    def test_is_the_layer(self, function, layer):
        x, cotangent = (norm_cases.numbers(i, (3, 5, 16)) for i in (0, 1))
        variables = norm_cases.variables(layer, x)
        params = variables.get("params", {})

        @jax.jit
        def run(params, x):
            def call(params, x):
                out = function(x, **params)
                return out if isinstance(out, tuple) else (out,)

            (y, *statistics), pullback = jax.vjp(call, params, x)
            zeros = [jnp.zeros_like(s) for s in statistics]
            return (y, statistics), pullback((cotangent, *zeros))

        (y, statistics), gradients = run(params, x)
        expected = norm_cases.run(layer, variables, x, cotangent)
        reference.assert_same_bits(y, expected[0])
        if statistics:
            averages = expected[1]["batch_stats"]
            chex.assert_trees_all_equal(statistics, [averages["mean"], averages["var"]])
        norm_cases.assert_near_as_a_whole(gradients, expected[2:])

    def test_groups_divide_the_channels(self):
        with pytest.raises(ValueError, match="3 groups do not divide 16 channels"):
            norms.group_norm(jnp.ones((2, 16)), 3)


def _residual_bytes(case):
    """Codes, their groups, and statistics in float32."""
    index = np.indices(case.shape)
    if case.group_size is not None:
        index[-1] //= case.group_size
    index[list(case.axes)] = 0
    statistics = np.unique(np.ravel_multi_index(tuple(index), case.shape)).size
    groups = len(reference.chunks(case.shape, 64))
    return [np.prod(case.shape), 2 * groups, 2 * groups, 4 * statistics]


class CacheTest(parameterized.TestCase):
    @parameterized.parameters(*norm_cases.CASES)
    def test_bytes_are_as_claimed(self, name):
        case = norm_cases.CASES[name]
        x = norm_cases.numbers(0, case.shape, case.dtype)
        layer = case.layers[1]
        variables = norm_cases.variables(layer, x)
        expected = _residual_bytes(case)
        if case.mask is not None:
            expected.append(case.arguments["mask"].nbytes)
        if "scale" in (params := variables.get("params", {})):
            expected.append(params["scale"].nbytes)

        def call(params, x):
            used = variables | {"params": params}
            return layer.apply(used, x, mutable=["batch_stats"], **case.arguments)[0]

        self.assertEqual(norm_cases.cached(call, params, x), sorted(expected))

    def test_averages_without_a_scale_cache_no_input(self):
        layer = dn.BatchNorm(use_running_average=True, use_scale=False)
        x = norm_cases.numbers(0, (6, 3, 16))
        variables = norm_cases.variables(layer, x)
        cached = norm_cases.cached(lambda x: layer.apply(variables, x), x)
        self.assertEqual(cached, [4 * 16])

    def test_a_policy_can_save_it_and_nothing_else(self):
        def scaled(x):
            return norms.layer_norm(2 * x)

        x = norm_cases.numbers(0, (3, 5, 24))
        save = jax.checkpoint_policies.save_only_these_names(
            norm_gradient.RESIDUAL_NAME
        )
        saved = jax.checkpoint(scaled, policy=save)
        self.assertEqual(
            norm_cases.cached(saved, x),
            sorted(_residual_bytes(norm_cases.CASES["layer"])),
        )


class TransformationsTest(parameterized.TestCase):
    def test_gradients_are_those_of_the_plain_call(self):
        x, scale = norm_cases.numbers(0, (4, 3, 16)), norm_cases.numbers(1, (16,))

        def loss(scale, x):
            return jnp.sum(norms.layer_norm(x, scale) ** 3)

        def scanned(scale, x):
            return lax.scan(lambda t, x: (t + loss(scale, x), None), 0.0, x)[0]

        both = functools.partial(jax.grad, argnums=(0, 1))

        @jax.jit
        def gradients(scale, x):
            mapped = functools.partial(jax.vmap, in_axes=(None, 0))
            return (
                lax.map(lambda x: both(loss)(scale, x), x),
                mapped(both(loss))(scale, x),
                mapped(both(jax.checkpoint(loss)))(scale, x),
            ), both(scanned)(scale, x)

        (expected, *actual), total = gradients(scale, x)
        close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-5)
        for gradient in actual:
            close(gradient, expected)
        close(total, (expected[0].sum(0), expected[1]))

    def test_flaxs_scan_and_remat(self):
        x = norm_cases.numbers(0, (6, 16))

        def run(cls):
            class Block(nn.Module):
                @nn.compact
                def __call__(self, x, _):
                    norm = nn.remat(cls)(use_running_average=False, name="norm")
                    return norm(x) * x, None

            axes = {"params": 0, "batch_stats": 0}
            rngs = {"params": True}
            stack = nn.scan(Block, variable_axes=axes, split_rngs=rngs, length=2)()

            def gradients(variables):
                def loss(params):
                    used = variables | {"params": params}
                    (y, _), updated = stack.apply(used, x, None, mutable="batch_stats")
                    return jnp.sum(jnp.sin(y)), (y, updated)

                return jax.grad(loss, has_aux=True)(variables["params"])

            init = jax.eval_shape(stack.init, jax.random.key(0), x, None)
            ones = jax.tree.map(lambda a: jnp.full(a.shape, 0.5, a.dtype), init)
            return jax.jit(gradients)(ones)

        actual, expected = run(dn.BatchNorm), run(nn.BatchNorm)
        chex.assert_trees_all_close(actual[1], expected[1], rtol=1e-6)
        norm_cases.assert_near_as_a_whole(actual[0], expected[0])

    def test_second_derivatives_are_refused(self):
        def loss(x):
            return jnp.sum(norms.rms_norm(x) ** 2)

        with pytest.raises(TypeError, match="normalisation has no second derivative"):
            jax.grad(lambda x: jax.grad(loss)(x).sum())(jnp.ones(3))


def _collectives(compiled):
    return collections.Counter(_COLLECTIVE.findall(compiled.as_text()))


def _loss_gradient(layer, variables):
    def loss(params, x):
        used = variables | {"params": params}
        y, updated = layer.apply(used, x, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(3 * y)), updated

    return jax.grad(loss, argnums=(0, 1), has_aux=True)


class DevicesTest(parameterized.TestCase):
    def _assert_same(self, actual, alone, flax):
        """As on one device, and near what Flax gives."""
        close = functools.partial(chex.assert_trees_all_close, rtol=1e-4, atol=1e-4)
        close(actual, alone)
        close(actual[1], flax[1])
        norm_cases.assert_near_as_a_whole(actual[0], flax[0])

    @parameterized.product(
        case=(
            ("BatchNorm", norm_cases.BATCH, (8, 4, 16), P("data")),
            ("LayerNorm", {}, (8, 4, 256), P("data", None, "model")),
            ("GroupNorm", {"num_groups": 4}, (8, 4, 16), P("data")),
        ),
        axis_type=(AxisType.Auto, AxisType.Explicit),
    )
    def test_a_mesh_moves_what_it_does_for_flax(self, case, axis_type):
        kind, options, shape, spec = case
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
        x = norm_cases.numbers(0, shape)
        theirs, ours = norm_cases.Case(kind, (), (), options).layers
        variables = norm_cases.variables(theirs, x)
        moved, results = [], []
        for layer in (theirs, ours):
            gradient = jax.jit(_loss_gradient(layer, variables))
            with jax.set_mesh(mesh):
                params = jax.device_put(variables["params"], P())
                sharded = jax.device_put(x, spec)
                compiled = gradient.lower(params, sharded).compile()
                results.append(jax.device_get(compiled(params, sharded)))
            moved.append(_collectives(compiled))
        self.assertEqual(*moved)
        alone = jax.device_get(gradient(variables["params"], x))
        self._assert_same(results[1], alone, results[0])

    def test_a_gradient_outside_of_a_named_vmap_is_explained(self):
        layer = dn.BatchNorm(use_running_average=False, axis_name="data")
        x = norm_cases.numbers(0, (4, 3, 8))
        variables = nn.BatchNorm(use_running_average=False).init(
            jax.random.key(0), x[0]
        )

        def loss(x):
            def apply(x):
                return layer.apply(variables, x, mutable=["batch_stats"])[0]

            return jax.vmap(apply, axis_name="data")(x).sum()

        with pytest.raises(NameError, match=r"axis_name='data'.*inside of it"):
            jax.grad(loss)(x)

    @parameterized.parameters(
        ("BatchNorm", norm_cases.BATCH), ("RMSNorm", {"reduction_axes": (0, -1)})
    )
    def test_statistics_over_a_named_axis(self, kind, options):
        x = norm_cases.numbers(0, (8, 4, 16))
        whole = norm_cases.Case(kind, (), (), options).layers
        variables = norm_cases.variables(whole[0], x)
        params = variables.get("params", {})
        named = norm_cases.Case(kind, (), (), options | {"axis_name": "data"}).layers
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        specs = {"in_specs": (P(), P("data")), "out_specs": ((P(), P("data")), P())}

        def mapped(layer):
            gradient = _loss_gradient(layer, variables)
            run = jax.vmap(gradient, in_axes=(None, 0), axis_name="data")
            (to_params, to_x), updated = run(params, x[:, None])
            total = jax.tree.map(lambda a: a.sum(0), to_params)
            return (total, to_x[:, 0]), jax.tree.map(lambda a: a[0], updated)

        moved, results = [], []
        for layer in named:
            gradient = _loss_gradient(layer, variables)
            sharded = jax.shard_map(gradient, mesh=mesh, **specs)
            compiled = jax.jit(sharded).lower(params, x).compile()
            moved.append(_collectives(compiled))
            results.append(jax.device_get(compiled(params, x)))
        self.assertEqual(*moved)
        alone = jax.jit(_loss_gradient(whole[1], variables))(params, x)
        self._assert_same(results[1], jax.device_get(alone), results[0])
        over_vmap = jax.device_get(jax.jit(mapped, static_argnums=0)(named[1]))
        self._assert_same(over_vmap, jax.device_get(alone), results[0])


class DropoutTest(parameterized.TestCase):
    @parameterized.parameters(
        ((0.3,), {}),
        ((0.5, (1,)), {}, "bfloat16"),
        ((0.5, (), None, "noise"), {"deterministic": False}),
        ((0.5, (-1,)), {"rng": jax.random.key(7)}),
        ((0.5,), {"deterministic": True}),
        ((0.0,), {}),
        ((1.0,), {}),
    )
    def test_is_flaxs_layer(self, fields, arguments, dtype="float32"):
        x, cotangent = (norm_cases.numbers(i, (2, 5, 16), dtype) for i in (0, 1))
        rngs = {name: jax.random.key(3) for name in ("dropout", "noise")}
        arguments = {"deterministic": False} | arguments

        def run(cls):
            class Model(nn.Module):
                @nn.compact
                def __call__(self, x):
                    for _ in range(2):
                        x = cls(*fields)(x, **arguments)
                    return x

            @jax.jit
            def run(x, cotangent):
                call = functools.partial(Model().apply, {}, rngs=rngs)
                y, pullback = jax.vjp(call, x)
                return y, *pullback(cotangent)

            return run(x, cotangent)

        actual, expected = run(dn.Dropout), run(nn.Dropout)
        jax.tree.map(reference.assert_same_bits, actual, expected)

    def test_caches_bits(self):
        layer = dn.Dropout(0.5, deterministic=False)
        x, rngs = jnp.ones((3, 16)), {"dropout": jax.random.key(0)}
        self.assertEqual(
            norm_cases.cached(lambda x: layer.apply({}, x, rngs=rngs), x), [6]
        )

    def test_errors_are_flaxs(self):
        for given in ({}, {"deterministic": False}):
            messages = []
            for cls in (nn.Dropout, dn.Dropout):
                with pytest.raises(Exception, match=r".") as info:
                    cls(0.5).apply({}, jnp.ones(3), **given)
                messages.append(str(info.value))
            self.assertEqual(*messages)


if __name__ == "__main__":
    absltest.main()
