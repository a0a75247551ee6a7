"""Parameters of a layer, read without a look at their initialisers."""

import functools

import chex
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

import dropit_jax.linen as dn
from dropit_jax import DropIT
from dropit_jax.linen.parameters import read_by_shape
from tests.dropit_jax import reference

_POLICY = DropIT(chunk_size=16)
_X = (2, 4, 8, 16)

# The layer, ours or Flax's, the arguments but for initialisers, and the names of these.
_LAYERS = {
    "Dense": ({"features": 4}, ("kernel_init", "bias_init")),
    "DenseGeneral": (
        {"features": (2, 4), "axis": (-2, -1)},
        ("kernel_init", "bias_init"),
    ),
    "Conv": ({"features": 4, "kernel_size": (3, 3)}, ("kernel_init", "bias_init")),
    "LayerNorm": ({}, ("scale_init", "bias_init")),
    "RMSNorm": ({}, ("scale_init",)),
    "GroupNorm": ({"num_groups": 4}, ("scale_init", "bias_init")),
    "BatchNorm": ({"use_running_average": True}, ("scale_init", "bias_init")),
}
_WITH_POLICY = ("Dense", "DenseGeneral", "Conv")


class _Counted:
    """An initialiser that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, key, shape, dtype=jnp.float32):
        self.calls += 1
        return jax.random.normal(key, shape, dtype)


def _layer(library, name, **initialisers):
    arguments, _ = _LAYERS[name]
    if library is dn and name in _WITH_POLICY:
        arguments = arguments | {"dropit": _POLICY}
    return getattr(library, name)(**arguments, **initialisers)


class _Plain(nn.Module):
    """Parameters of its own, read by shape or not."""

    by_shape: bool
    names: tuple[str, ...] = ("scale", "shift")

    @nn.compact
    def __call__(self, x):
        if not self.by_shape:
            return self._apply(x)
        with read_by_shape(self):
            return self._apply(x)

    def _apply(self, x):
        for name in self.names:
            x = x + self.param(name, nn.initializers.normal(), (x.shape[-1],))
        return x


class _Sharing(nn.Module):
    """Calls another module of the same scope while it reads its parameters."""

    @nn.compact
    def __call__(self, x):
        other = _Plain(True)
        nn.share_scope(self, other)
        with read_by_shape(self):
            x = other(x)
            return x * self.param("factor", nn.initializers.normal(), (x.shape[-1],))


class ParametersTest(parameterized.TestCase):
    @parameterized.parameters(*_LAYERS)
    def test_initialisers_are_not_traced_again(self, name):
        x = jnp.asarray(reference.finite(0, _X))
        calls = {}
        for library in (nn, dn):
            initialisers = {field: _Counted() for field in _LAYERS[name][1]}
            layer = _layer(library, name, **initialisers)
            variables = layer.init(jax.random.key(0), x)
            before = sum(each.calls for each in initialisers.values())
            layer.apply(variables, x)
            calls[library] = sum(each.calls for each in initialisers.values()) - before
        self.assertEqual(calls[nn], len(_LAYERS[name][1]))  # what it is good for
        self.assertEqual(calls[dn], 0)

    @parameterized.parameters(*_LAYERS)
    def test_another_shape_is_flaxs_error(self, name):
        x = jnp.zeros(_X)
        variables = _layer(nn, name).init(jax.random.key(0), x)
        variables["params"] = jax.tree.map(lambda p: p[..., :-1], variables["params"])
        messages = []
        for library in (nn, dn):
            with pytest.raises(flax.errors.ScopeParamShapeError) as error:
                _layer(library, name).apply(variables, x)
            messages.append(str(error.value))
        self.assertEqual(*messages)

    @parameterized.parameters(*_LAYERS)
    def test_a_missing_parameter_is_flaxs_error(self, name):
        x = jnp.zeros(_X)
        variables = _layer(nn, name).init(jax.random.key(0), x)
        *_, last = variables["params"]
        del variables["params"][last]
        variables["params"]["other"] = jnp.zeros(())
        for library in (nn, dn):
            with pytest.raises(flax.errors.ScopeParamNotFoundError, match=last):
                _layer(library, name).apply(variables, x)

    def test_parameters_may_be_partitioned(self):
        kernel_init = nn.with_partitioning(nn.initializers.normal(), (None, "model"))
        layer = functools.partial(dn.Dense, 4, kernel_init=kernel_init)
        x = jnp.asarray(reference.finite(0, (2, 16)))
        variables = layer().init(jax.random.key(0), x)
        self.assertIsInstance(variables["params"]["kernel"], nn.Partitioned)
        chex.assert_trees_all_equal(
            layer(dropit=_POLICY).apply(variables, x), layer().apply(variables, x)
        )

    @parameterized.parameters(True, False)
    def test_they_are_made_as_ever(self, by_shape):
        x = jnp.ones((2, 4))
        expected = _Plain(False).init(jax.random.key(0), x)
        chex.assert_trees_all_equal(
            _Plain(by_shape).init(jax.random.key(0), x), expected
        )
        chex.assert_trees_all_equal(
            _Plain(by_shape).apply(expected, x), _Plain(False).apply(expected, x)
        )

    def test_no_name_is_taken_twice(self):
        variables = {"params": {"scale": jnp.ones(4)}}
        with pytest.raises(flax.errors.NameInUseError):
            _Plain(True, ("scale", "scale")).apply(variables, jnp.ones((2, 4)))

    def test_modules_may_share_a_scope(self):
        x = jnp.ones((2, 4))
        layer = _Sharing()
        variables = layer.init(jax.random.key(0), x)
        self.assertSameElements(variables["params"], ["scale", "shift", "factor"])
        bound = layer.bind(variables)
        bound(x)
        self.assertNotIn("param", vars(bound.scope))


if __name__ == "__main__":
    absltest.main()
