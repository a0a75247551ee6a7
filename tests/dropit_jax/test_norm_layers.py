import contextlib
import dataclasses
from unittest import mock

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax.linen import normalization

from dropit_jax import linen as dn
from dropit_jax.nn import norm_gradient
from tests.dropit_jax import norm_cases, reference


def _exact(case, variables, x, cotangent):
    """The gradients of Flax's layer in float64."""
    options = {k: v for k, v in case.options.items() if not k.endswith("dtype")}
    layer = getattr(nn, case.kind)(**options)
    with jax.enable_x64(True):
        given = jax.tree.map(jnp.asarray, norm_cases.wide((variables, x, cotangent)))
        return jax.device_get(norm_cases.run(layer, *given, **case.arguments)[2:])


def _bounds(case, params, x, cotangent):
    """What `dropit_jax.nn.norms` says of the errors, from its definition."""
    x, g, params = norm_cases.wide((x, cotangent, params))
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


class TwinTest(parameterized.TestCase):
    def _assert_is_flaxs_layer(self, case, x, rounding=1e-5):
        """To the bit, but for gradients, which are near the exact ones."""
        theirs, ours = case.layers
        variables = norm_cases.variables(theirs, x)
        params = variables.get("params", {})
        cotangent = norm_cases.numbers(1, x.shape, case.options.get("dtype", x.dtype))
        given = variables, x, cotangent
        actual, expected = (
            norm_cases.run(layer, *given, **case.arguments) for layer in (ours, theirs)
        )
        jax.tree.map(reference.assert_same_bits, actual[:2], expected[:2])
        chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
        exact = _exact(case, *given)
        bounds = _bounds(case, params, x, cotangent)
        _assert_near(actual[2:], exact, bounds, rounding)
        return actual[2:], exact

    @parameterized.parameters(*norm_cases.CASES)
    def test_is_flaxs_layer_but_for_gradients_within_their_bound(self, name):
        case = norm_cases.CASES[name]
        x = norm_cases.numbers(0, case.shape, case.dtype)
        actual, exact = self._assert_is_flaxs_layer(case, x)
        norm_cases.assert_near_as_a_whole(actual, exact)

    @parameterized.parameters(
        ("batch", (0, 1, 2)), ("layer", (3,)), ("rms", (3,)), ("group", (1, 2))
    )
    def test_without_any_variance(self, name, axes):
        # Over powers of two of elements, so that it is 0 in float32, too.
        case = dataclasses.replace(
            norm_cases.CASES[name], shape=(2, 4, 4, 16), axes=axes
        )
        x = jnp.broadcast_to(jnp.float32(2), case.shape)
        self._assert_is_flaxs_layer(case, x, rounding=3e-3)

    @parameterized.parameters(
        ("bfloat16", {}, 2.0**-8), ("float64", {"use_scale": False}, 1e-15)
    )
    def test_running_averages_leave_the_inputs_gradient_exact(
        self, dtype, options, last_bit
    ):
        options = {"use_running_average": True} | options
        theirs, ours = norm_cases.Case("BatchNorm", (), (), options).layers
        with jax.enable_x64(dtype == "float64"):
            x, cotangent = (norm_cases.numbers(i, (6, 3, 16), dtype) for i in (0, 1))
            given = norm_cases.variables(theirs, x), x, cotangent
            actual, expected = (
                norm_cases.run(layer, *given) for layer in (ours, theirs)
            )
            reference.assert_same_bits(actual[0], expected[0])
            reference.assert_same_bits(actual[2]["bias"], expected[2]["bias"])
            np.testing.assert_allclose(
                *norm_cases.wide((actual[3], expected[3])), rtol=last_bit
            )
        norm_cases.assert_near_as_a_whole(actual, expected)

    @parameterized.parameters(*norm_cases.EACH)
    def test_has_the_variables_of_flaxs_layer(self, name):
        init = nn.initializers.normal()
        scale = nn.with_partitioning(init, ("model",))
        case = dataclasses.replace(
            norm_cases.CASES[name],
            options=norm_cases.CASES[name].options | {"scale_init": scale},
        )
        x = norm_cases.numbers(0, case.shape)
        theirs, ours = (
            jax.jit(layer.init)(jax.random.key(0), x) for layer in case.layers
        )
        chex.assert_trees_all_equal(theirs, ours)

    def test_parameters_may_be_partitioned(self):
        scale = nn.with_partitioning(nn.initializers.ones, ("model",))
        x, cotangent = (norm_cases.numbers(i, (3, 16)) for i in (0, 1))
        layers = dn.LayerNorm(scale_init=scale), dn.LayerNorm()
        boxed, plain = (
            norm_cases.run(
                layer, jax.jit(layer.init)(jax.random.key(0), x), x, cotangent
            )
            for layer in layers
        )
        self.assertEqual(boxed[2]["scale"].names, ("model",))
        chex.assert_trees_all_equal(nn.meta.unbox(boxed), plain)

    @parameterized.parameters("int32", "complex64")
    def test_what_is_not_real_and_floating_is_left_to_flax(self, dtype):
        x = norm_cases.numbers(0, (3, 16)).astype(dtype)
        theirs, ours = norm_cases.CASES["layer"].layers
        variables = norm_cases.variables(theirs, x)
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
        x = norm_cases.numbers(0, shape)
        variables = {"params": {"scale": jnp.ones(16), "bias": jnp.ones(16)}}
        with pytest.raises(Exception, match=message):
            layer.apply(variables, x)

    def test_nan_surfaces(self):
        theirs, ours = norm_cases.CASES["layer"].layers
        x = norm_cases.numbers(0, (3, 5, 24)).at[1, 2, 3].set(jnp.nan)
        given = norm_cases.variables(theirs, x), x, norm_cases.numbers(1, x.shape)
        actual, expected = (norm_cases.run(layer, *given) for layer in (ours, theirs))
        reference.assert_same_bits(actual[0], expected[0])
        self.assertTrue(np.isnan(actual[2]["scale"]).all())
        self.assertTrue(np.isnan(actual[3][1, 2]).all())
        self.assertTrue(np.isfinite(actual[3][::2]).all())  # other samples

    def test_statistics_are_flaxs(self):
        x = norm_cases.numbers(0, (6, 16), "bfloat16")
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
        case = norm_cases.CASES[name]
        x = norm_cases.numbers(0, case.shape, case.dtype)
        layer = case.layers[1]
        given = norm_cases.variables(layer, x), x, norm_cases.numbers(1, x.shape)
        nothing = lambda _: contextlib.nullcontext([])  # noqa: E731
        noted = norm_cases.run(layer, *given, **case.arguments)
        with mock.patch("dropit_jax.norm_layers.statistics_noted", nothing):
            again = norm_cases.run(layer, *given, **case.arguments)
        chex.assert_trees_all_close(noted, again, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    absltest.main()
