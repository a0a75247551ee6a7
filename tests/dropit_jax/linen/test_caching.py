"""Calls of our linen layers as Flax and its interceptors see them."""

import contextlib
import functools

import flax.linen as nn
import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from dropit_jax import DropIT
from dropit_jax import linen as dn
from tests.dropit_jax import reference

_POLICY = DropIT(0.5)

_LAYERS = {
    "Dense": ({"features": 8}, (4, 32)),
    "DenseGeneral": ({"features": 8, "axis": (1, 2)}, (3, 5, 4)),
    "Einsum": ({"shape": (32, 8), "einsum_str": "bd,dh->bh"}, (4, 32)),
    "Conv": ({"features": 8, "kernel_size": (3, 3)}, (2, 6, 6, 16)),
    "ConvLocal": ({"features": 4, "kernel_size": (3, 3)}, (2, 5, 6, 16)),
    "ConvTranspose": ({"features": 8, "kernel_size": (3, 3)}, (2, 5, 6, 16)),
    "MultiHeadDotProductAttention": ({"num_heads": 2}, (2, 5, 16)),
    "SelfAttention": ({"num_heads": 2}, (2, 5, 16)),
}


def _input(shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


class CallTest(parameterized.TestCase):
    @parameterized.product(
        layer=["Dense", "Conv", "Einsum", "ConvTranspose"], intercepted=[False, True]
    )
    def test_a_class_between_ours_and_flaxs_is_called(self, layer, intercepted):
        arguments, shape = _LAYERS[layer]

        def tripled(method):
            @functools.wraps(method)
            def call(self, x, **kwargs):
                return 3 * method(self, x, **kwargs)

            return call

        class Mixed(getattr(nn, layer)):
            @tripled
            def __call__(self, x, **kwargs):
                return super().__call__(x, **kwargs)

        class Own(getattr(dn, layer), Mixed):
            pass

        x = _input(shape)
        plain, own = getattr(nn, layer)(**arguments), Own(**arguments)
        variables = plain.init(jax.random.key(0), x)
        intercept = functools.partial(dn.intercept, _POLICY, skip_first=False)
        with intercept() if intercepted else contextlib.nullcontext():
            out = own.apply(variables, x)
        reference.assert_same_bits(out, 3 * plain.apply(variables, x))

    @parameterized.product(
        name=list(_LAYERS),
        has_policy=[True, False],
        intercepted=[False, True],
    )
    @pytest.mark.filterwarnings("ignore:SelfAttention will be deprecated")
    def test_intermediates_are_captured_once(self, name, has_policy, intercepted):
        arguments, shape = _LAYERS[name]
        x = _input(shape)
        policy = {"dropit": _POLICY} if has_policy else {}

        layers = (
            getattr(nn, name)(**arguments),
            getattr(dn, name)(**arguments, **policy),
        )

        def intermediates(layer):
            keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
            options = {"mutable": True, "capture_intermediates": True}
            return layer.init(keys, x, **options)["intermediates"]

        intercept = functools.partial(dn.intercept, _POLICY, skip_first=False)
        with intercept() if intercepted else contextlib.nullcontext():
            theirs, ours = (
                jax.eval_shape(lambda layer=layer: intermediates(layer))
                for layer in layers
            )
        self.assertEqual(ours, theirs)


if __name__ == "__main__":
    absltest.main()
