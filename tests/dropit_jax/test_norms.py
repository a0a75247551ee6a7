import collections
import contextlib
import dataclasses
import functools
import re
from typing import Any
from unittest import mock

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax.linen import normalization
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from dropit_jax import linen as dn
from dropit_jax.nn import norm_gradient, norms
from tests.dropit_jax import reference

_COLLECTIVE = re.compile(
    r" (all-[a-z]+|reduce-scatter|collective-permute)(?:-start)?\("
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer, and what its options come to, by hand.

    Attributes:
      kind: its class.
      shape: of the input.
      axes: over which statistics are taken, but for that of groups of channels.
      options: of the layer.
      group_size: of the groups of channels that share statistics.
      features: the axes along which scale and bias vary.
      dtype: of the input.
      mask: the shape of a mask.
    """

    kind: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    group_size: int | None = None
    features: tuple[int, ...] = (-1,)
    dtype: str = "float32"
    mask: tuple[int, ...] | None = None

    @property
    def arguments(self):
        """Those of the call."""
        if self.mask is None:
            return {}
        mask = np.random.default_rng(2).random(self.mask) < 0.8
        return {"mask": jnp.asarray(mask)}

    @property
    def layers(self):
        """Flax's, and ours."""
        return [getattr(m, self.kind)(**self.options) for m in (nn, dn)]


_BATCH = {"use_running_average": False}
_PLAIN = {"use_scale": False, "use_bias": False}
_SLOW = {"use_fast_variance": False}
_HALF = {"dtype": jnp.bfloat16}
_HALF_PARAMS = {"param_dtype": jnp.bfloat16}

_CASES = {
    "batch": Case("BatchNorm", (6, 3, 16), (0, 1), _BATCH),
    "batch_bfloat16": Case("BatchNorm", (4, 3, 128), (0, 1), _BATCH, dtype="bfloat16"),
    "batch_plain": Case("BatchNorm", (6, 3, 16), (0, 1), _BATCH | _PLAIN | _SLOW),
    "batch_axis": Case(
        "BatchNorm", (4, 5, 8), (0, 2), _BATCH | _HALF | {"axis": 1}, features=(1,)
    ),
    "batch_mask": Case("BatchNorm", (6, 3, 16), (0, 1), _BATCH, mask=(6, 3, 1)),
    "layer": Case("LayerNorm", (3, 5, 24), (2,)),
    "layer_one": Case("LayerNorm", (70,), (0,), _SLOW),
    "layer_bfloat16": Case(
        "LayerNorm", (2, 3, 128), (2,), _HALF_PARAMS, dtype="bfloat16"
    ),
    "layer_float16": Case("LayerNorm", (3, 24), (1,), _HALF, dtype="float16"),
    "layer_axes": Case(
        "LayerNorm",
        (3, 4, 16),
        (0, 2),
        {"reduction_axes": (0, -1), "feature_axes": (1, 2)},
        features=(1, 2),
    ),
    "layer_mask": Case(
        "LayerNorm", (3, 5, 24), (2,), _SLOW | {"use_bias": False}, mask=(3, 5, 24)
    ),
    "rms": Case("RMSNorm", (3, 5, 24), (2,)),
    "rms_plain": Case(
        "RMSNorm", (2, 128), (1,), {"use_scale": False}, dtype="bfloat16", mask=(128,)
    ),
    "group": Case("GroupNorm", (2, 3, 3, 16), (1, 2), {"num_groups": 4}, group_size=4),
    "group_size": Case(
        "GroupNorm",
        (2, 9, 16),
        (1,),
        {"num_groups": None, "group_size": 2, "use_scale": False},
        group_size=2,
        mask=(2, 9, 16),
    ),
    "group_axes": Case(
        "GroupNorm",
        (2, 5, 64),
        (),
        {"num_groups": 2, "reduction_axes": (-1,)},
        group_size=32,
        dtype="float16",
    ),
    "instance": Case("InstanceNorm", (2, 4, 4, 6), (1, 2)),
    "instance_axes": Case(
        "InstanceNorm", (3, 4, 5, 6), (2,), {"feature_axes": (1, 3)}, features=(1, 3)
    ),
}
_EACH = ("batch", "layer", "rms", "group", "instance")


def _numbers(seed, shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(0.5, 2, shape), dtype)


def _variables(layer, x):
    """Parameters and running averages that are neither 0 nor 1."""
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda a: jnp.asarray(rng.uniform(0.5, 1.5, a.shape), a.dtype), shapes
    )


def _run(layer, variables, x, cotangent, **arguments):
    """The output, what is updated, and the gradients of parameters and input."""

    def call(params, x):
        used = variables | {"params": params}
        return layer.apply(used, x, mutable=["batch_stats"], **arguments)

    @jax.jit
    def run(params, x, cotangent):
        y, pullback, updated = jax.vjp(call, params, x, has_aux=True)
        return y, updated, *pullback(cotangent.astype(y.dtype))

    return run(variables.get("params", {}), x, cotangent)


def _wide(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def _exact(case, variables, x, cotangent):
    """The gradients of Flax's layer in float64."""
    options = {k: v for k, v in case.options.items() if not k.endswith("dtype")}
    layer = getattr(nn, case.kind)(**options)
    with jax.enable_x64(True):
        given = jax.tree.map(jnp.asarray, _wide((variables, x, cotangent)))
        return jax.device_get(_run(layer, *given, **case.arguments)[2:])


def _bounds(case, params, x, cotangent):
    """What `dropit_jax.nn.norms` says of the errors, from its definition."""
    x, g, params = _wide((x, cotangent, params))
    index = np.indices(case.shape)
    features = tuple(index[list(case.features)].copy())
    if case.group_size is not None:
        index[-1] //= case.group_size
    index[list(case.axes)] = 0
    sets = np.ravel_multi_index(tuple(index), case.shape)  # that share statistics
    used = np.broadcast_to(case.arguments.get("mask", 1.0), case.shape).astype(float)

    def mean(values):
        sums, counts = (np.bincount(sets.ravel(), v.ravel()) for v in (values, used))
        return sums[sets] / counts[sets]

    mu = 0 if case.kind == "RMSNorm" else mean(x * used)
    epsilon = 1e-5 if case.kind == "BatchNorm" else 1e-6
    sigma = np.sqrt(mean((x - mu) ** 2 * used) + epsilon)
    x_hat = (x - mu) / sigma
    delta = np.zeros(case.shape)
    for group in reference.chunks(case.shape, 64):
        values = x_hat.flat[group]
        delta.flat[group] = (np.ptp(values) + 0.008 * abs(values.min())) / 506
    h = g * params["scale"][features] if "scale" in params else g
    to_x = delta * abs(mean(h * x_hat)) + (abs(x_hat) + delta) * mean(abs(h) * delta)
    bounds = {name: np.zeros(p.shape) for name, p in params.items()}
    if "scale" in params:
        np.add.at(bounds["scale"], features, abs(g) * delta)
    return bounds, to_x * used / sigma


def _assert_near(actual, exact, bounds, rounding):
    for a, e, bound in zip(*map(jax.tree.leaves, (actual, exact, bounds)), strict=True):
        eps = float(jnp.finfo(a.dtype).eps)
        error = np.abs(np.asarray(a, np.float64) - e)
        allowed = bound + eps / 2 * np.abs(e) + rounding
        np.testing.assert_array_less(error, allowed)


def _assert_near_as_a_whole(actual, expected):
    for a, e in zip(*map(jax.tree.leaves, _wide((actual, expected))), strict=True):
        assert np.linalg.norm(a - e) <= 0.015 * np.linalg.norm(e)


class TwinTest(parameterized.TestCase):
    def _assert_is_flaxs_layer(self, case, x, rounding=1e-5):
        """To the bit, but for gradients, which are near the exact ones."""
        theirs, ours = case.layers
        variables = _variables(theirs, x)
        params = variables.get("params", {})
        cotangent = _numbers(1, x.shape, case.options.get("dtype", x.dtype))
        given = variables, x, cotangent
        actual, expected = (
            _run(layer, *given, **case.arguments) for layer in (ours, theirs)
        )
        jax.tree.map(reference.assert_same_bits, actual[:2], expected[:2])
        chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
        exact = _exact(case, *given)
        bounds = _bounds(case, params, x, cotangent)
        _assert_near(actual[2:], exact, bounds, rounding)
        return actual[2:], exact

    @parameterized.parameters(*_CASES)
    def test_is_flaxs_layer_but_for_gradients_within_their_bound(self, name):
        case = _CASES[name]
        x = _numbers(0, case.shape, case.dtype)
        actual, exact = self._assert_is_flaxs_layer(case, x)
        _assert_near_as_a_whole(actual, exact)

    @parameterized.parameters(
        ("batch", (0, 1, 2)), ("layer", (3,)), ("rms", (3,)), ("group", (1, 2))
    )
    def test_without_any_variance(self, name, axes):
        # Over powers of two of elements, so that it is 0 in float32, too.
        case = dataclasses.replace(_CASES[name], shape=(2, 4, 4, 16), axes=axes)
        x = jnp.broadcast_to(jnp.float32(2), case.shape)
        self._assert_is_flaxs_layer(case, x, rounding=3e-3)

    @parameterized.parameters(
        ("bfloat16", {}, 2.0**-8), ("float64", {"use_scale": False}, 1e-15)
    )
    def test_running_averages_leave_the_inputs_gradient_exact(
        self, dtype, options, last_bit
    ):
        options = {"use_running_average": True} | options
        theirs, ours = Case("BatchNorm", (), (), options).layers
        with jax.enable_x64(dtype == "float64"):
            x, cotangent = (_numbers(i, (6, 3, 16), dtype) for i in (0, 1))
            given = _variables(theirs, x), x, cotangent
            actual, expected = (_run(layer, *given) for layer in (ours, theirs))
            reference.assert_same_bits(actual[0], expected[0])
            reference.assert_same_bits(actual[2]["bias"], expected[2]["bias"])
            np.testing.assert_allclose(*_wide((actual[3], expected[3])), rtol=last_bit)
        _assert_near_as_a_whole(actual, expected)

    @parameterized.parameters(*_EACH)
    def test_has_the_variables_of_flaxs_layer(self, name):
        init = nn.initializers.normal()
        scale = nn.with_partitioning(init, ("model",))
        case = dataclasses.replace(
            _CASES[name], options=_CASES[name].options | {"scale_init": scale}
        )
        x = _numbers(0, case.shape)
        theirs, ours = (
            jax.jit(layer.init)(jax.random.key(0), x) for layer in case.layers
        )
        chex.assert_trees_all_equal(theirs, ours)

    def test_parameters_may_be_partitioned(self):
        scale = nn.with_partitioning(nn.initializers.ones, ("model",))
        x, cotangent = (_numbers(i, (3, 16)) for i in (0, 1))
        layers = dn.LayerNorm(scale_init=scale), dn.LayerNorm()
        boxed, plain = (
            _run(layer, jax.jit(layer.init)(jax.random.key(0), x), x, cotangent)
            for layer in layers
        )
        self.assertEqual(boxed[2]["scale"].names, ("model",))
        chex.assert_trees_all_equal(nn.meta.unbox(boxed), plain)

    @parameterized.parameters("int32", "complex64")
    def test_what_is_not_real_and_floating_is_left_to_flax(self, dtype):
        x = _numbers(0, (3, 16)).astype(dtype)
        theirs, ours = _CASES["layer"].layers
        variables = _variables(theirs, x)
        reference.assert_same_bits(
            ours.apply(variables, x).real, theirs.apply(variables, x).real
        )

    @parameterized.parameters(
        (dn.GroupNorm(3), (2, 16), "divide"),
        (dn.GroupNorm(4, 4), (2, 16), "Either"),
        (dn.InstanceNorm(feature_axes=(0, -1)), (2, 3, 16), "leading dimension"),
        (dn.BatchNorm(), (2, 16), "use_running_average"),
    )
    def test_errors_are_flaxs(self, layer, shape, message):
        x = _numbers(0, shape)
        variables = {"params": {"scale": jnp.ones(16), "bias": jnp.ones(16)}}
        with pytest.raises(Exception, match=message):
            layer.apply(variables, x)

    def test_nan_surfaces(self):
        theirs, ours = _CASES["layer"].layers
        x = _numbers(0, (3, 5, 24)).at[1, 2, 3].set(jnp.nan)
        given = _variables(theirs, x), x, _numbers(1, x.shape)
        actual, expected = (_run(layer, *given) for layer in (ours, theirs))
        reference.assert_same_bits(actual[0], expected[0])
        self.assertTrue(np.isnan(actual[2]["scale"]).all())
        self.assertTrue(np.isnan(actual[3][1, 2]).all())
        self.assertTrue(np.isfinite(actual[3][::2]).all())  # other samples

    def test_statistics_are_flaxs(self):
        x = _numbers(0, (6, 16), "bfloat16")
        options = {"use_fast_variance": False, "mask": x > 0, "dtype": jnp.float32}
        for kwargs in ({}, {"mask": x > 0}, options, {"dtype": jnp.float32}):
            given = kwargs if "dtype" in kwargs else {"dtype": None} | kwargs
            expected = normalization._compute_stats(x, (0,), **given)
            actual = norm_gradient.statistics(
                x, norm_gradient.Norm((0,), 1e-5), **kwargs
            )
            jax.tree.map(
                reference.assert_same_bits, [a[0] for a in actual], list(expected)
            )

    @parameterized.parameters("batch_mask", "layer_float16", "group_size", "rms")
    def test_without_flaxs_hook_statistics_are_computed_again(self, name):
        case = _CASES[name]
        x = _numbers(0, case.shape, case.dtype)
        layer = case.layers[1]
        given = _variables(layer, x), x, _numbers(1, x.shape)
        nothing = lambda _: contextlib.nullcontext([])  # noqa: E731
        noted = _run(layer, *given, **case.arguments)
        with mock.patch("dropit_jax.norm_layers.statistics_noted", nothing):
            again = _run(layer, *given, **case.arguments)
        chex.assert_trees_all_close(noted, again, rtol=1e-5, atol=1e-6)


# (ours, Flax's)
_FUNCTIONS = (
    (norms.layer_norm, nn.LayerNorm()),
    (functools.partial(norms.layer_norm, epsilon=0.1), nn.LayerNorm(epsilon=0.1)),
    (norms.layer_norm, nn.LayerNorm(**_PLAIN)),
    (norms.rms_norm, nn.RMSNorm()),
    (lambda x, **p: norms.group_norm(x, 4, **p), nn.GroupNorm(4)),
    (norms.batch_norm, nn.BatchNorm(**_BATCH, momentum=0)),
)


class FunctionTest(parameterized.TestCase):
    @parameterized.parameters(*_FUNCTIONS)
    def test_is_the_layer(self, function, layer):
        x, cotangent = (_numbers(i, (3, 5, 16)) for i in (0, 1))
        variables = _variables(layer, x)
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
        expected = _run(layer, variables, x, cotangent)
        reference.assert_same_bits(y, expected[0])
        if statistics:
            averages = expected[1]["batch_stats"]
            chex.assert_trees_all_equal(statistics, [averages["mean"], averages["var"]])
        _assert_near_as_a_whole(gradients, expected[2:])

    def test_groups_divide_the_channels(self):
        with pytest.raises(ValueError, match="3 groups do not divide 16 channels"):
            norms.group_norm(jnp.ones((2, 16)), 3)


def _cached(fn, *args):
    """The bytes of what the backward pass of a function reads."""
    pullback = jax.eval_shape(lambda *args: jax.vjp(fn, *args)[1], *args)
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pullback)]
    return sorted(size for size in sizes if size)


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
    @parameterized.parameters(*_CASES)
    def test_bytes_are_as_claimed(self, name):
        case = _CASES[name]
        x = _numbers(0, case.shape, case.dtype)
        layer = case.layers[1]
        variables = _variables(layer, x)
        expected = _residual_bytes(case)
        if case.mask is not None:
            expected.append(case.arguments["mask"].nbytes)
        if "scale" in (params := variables.get("params", {})):
            expected.append(params["scale"].nbytes)

        def call(params, x):
            used = variables | {"params": params}
            return layer.apply(used, x, mutable=["batch_stats"], **case.arguments)[0]

        self.assertEqual(_cached(call, params, x), sorted(expected))

    def test_averages_without_a_scale_cache_no_input(self):
        layer = dn.BatchNorm(use_running_average=True, use_scale=False)
        x = _numbers(0, (6, 3, 16))
        variables = _variables(layer, x)
        cached = _cached(lambda x: layer.apply(variables, x), x)
        self.assertEqual(cached, [4 * 16])

    def test_a_policy_can_save_it_and_nothing_else(self):
        def scaled(x):
            return norms.layer_norm(2 * x)

        x = _numbers(0, (3, 5, 24))
        save = jax.checkpoint_policies.save_only_these_names(
            norm_gradient.RESIDUAL_NAME
        )
        saved = jax.checkpoint(scaled, policy=save)
        self.assertEqual(_cached(saved, x), sorted(_residual_bytes(_CASES["layer"])))


class TransformationsTest(parameterized.TestCase):
    def test_gradients_are_those_of_the_plain_call(self):
        x, scale = _numbers(0, (4, 3, 16)), _numbers(1, (16,))

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
        x = _numbers(0, (6, 16))

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
        _assert_near_as_a_whole(actual[0], expected[0])

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
        _assert_near_as_a_whole(actual[0], flax[0])

    @parameterized.product(
        case=(
            ("BatchNorm", _BATCH, (8, 4, 16), P("data")),
            ("LayerNorm", {}, (8, 4, 256), P("data", None, "model")),
            ("GroupNorm", {"num_groups": 4}, (8, 4, 16), P("data")),
        ),
        axis_type=(AxisType.Auto, AxisType.Explicit),
    )
    def test_a_mesh_moves_what_it_does_for_flax(self, case, axis_type):
        kind, options, shape, spec = case
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
        x = _numbers(0, shape)
        theirs, ours = Case(kind, (), (), options).layers
        variables = _variables(theirs, x)
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
        x = _numbers(0, (4, 3, 8))
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
        ("BatchNorm", _BATCH), ("RMSNorm", {"reduction_axes": (0, -1)})
    )
    def test_statistics_over_a_named_axis(self, kind, options):
        x = _numbers(0, (8, 4, 16))
        whole = Case(kind, (), (), options).layers
        variables = _variables(whole[0], x)
        params = variables.get("params", {})
        named = Case(kind, (), (), options | {"axis_name": "data"}).layers
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
        x, cotangent = (_numbers(i, (2, 5, 16), dtype) for i in (0, 1))
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
        self.assertEqual(_cached(lambda x: layer.apply({}, x, rngs=rngs), x), [6])

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
