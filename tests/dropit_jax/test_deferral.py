"""Selections are in no forward pass, and are shared by products of one array."""

import collections
import functools
import re

import chex
import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

from dropit_jax import DropIT, dot_general, memory
from tests.dropit_jax.operations import OPERATIONS

_PRODUCT = (((1,), (0,)), ((), ()))
_NAMES = jax.checkpoint_policies.save_only_these_names("dropit")
# What moves no numbers and computes none.
_FREE = {"broadcast_in_dim", "constant", "convert", "reshape"}


def _in_scan(function):
    def scanned(kernels, x):
        return jax.lax.scan(lambda x, k: (function(k, x), None), x, kernels)[0]

    def call(kernels, x):
        return scanned(jax.tree.map(lambda k: k[None], kernels), x)

    return call


def _in_cond(function):
    def call(kernels, x):
        return jax.lax.cond(x[0, 0] < 9, function, lambda _, x: x, kernels, x)

    return call


def _vmapped(function):
    def call(kernels, x):
        return jax.vmap(function, (None, 0))(kernels, x[None])[0]

    return call


_AROUND = {
    "nothing": lambda function: function,
    "jit": jax.jit,
    "scan": _in_scan,
    "cond": _in_cond,
    "vmap": _vmapped,
    "checkpoint": functools.partial(jax.checkpoint, policy=_NAMES),
    "scan of checkpoint": lambda f: _in_scan(jax.checkpoint(f, policy=_NAMES)),
    "scan of vmap": lambda f: _in_scan(_vmapped(f)),
    "vmap of scan": lambda f: _vmapped(_in_scan(f)),
    "jit of scan of jit": lambda f: jax.jit(_in_scan(jax.jit(f))),
}


def _computing(text):
    """The operations in a program's text."""
    operations = re.findall(r"stablehlo\.(\w+)", text)
    return collections.Counter(o for o in operations if o not in _FREE)


class DeferralTest(parameterized.TestCase):
    def test_a_forward_pass_computes_nothing_more(self):
        for name, operation in OPERATIONS.items():
            with self.subTest(name):
                arguments = operation.arguments("float32")
                own, plain = (
                    _computing(jax.jit(function).lower(*arguments).as_text())
                    for function in (operation.own, operation.plain)
                )
                self.assertLessEqual(own.total(), plain.total())

    @parameterized.product(
        around=list(_AROUND), policy=[DropIT(0.5), DropIT(0.5, "random")]
    )
    def test_products_of_one_array_cache_it_once(self, around, policy):
        key = jax.random.key(2) if policy.needs_key else None

        def block(kernels, x):
            x = jnp.sin(x)
            out = x
            for kernel in kernels:
                out = out * dot_general(x, kernel, _PRODUCT, dropit=policy, key=key)
            return out

        x = jax.random.normal(jax.random.key(0), (8, 64))
        kernels = list(jax.random.normal(jax.random.key(1), (3, 64, 64)) / 8)
        function = _AROUND[around](block)

        def loss(kernels, x):
            return jnp.sum(function(kernels, x))

        def codes(kernels):
            saved = memory.saved_residuals(loss, kernels, x).residuals
            return sum(each.dtype == "uint8" for each in saved)

        self.assertGreater(codes(kernels), 0)
        self.assertEqual(codes(kernels), codes(kernels[:1]))
        expected = jax.grad(lambda kernels: jnp.sum(block(kernels, x)))(kernels)
        chex.assert_trees_all_close(jax.grad(loss)(kernels, x), expected, rtol=1e-4)

    @parameterized.parameters("nothing", "jit", "scan", "checkpoint")
    def test_so_do_products_that_vmap_does_not_map(self, around):
        x = jax.random.normal(jax.random.key(0), (8, 64))
        kernels = list(jax.random.normal(jax.random.key(1), (3, 2, 64, 64)) / 8)

        def block(kernels, x):
            products = (dot_general(x, k, _PRODUCT, dropit=DropIT()) for k in kernels)
            return functools.reduce(jnp.multiply, products)

        function = _AROUND[around](block)

        def loss(kernels, x):
            return jnp.sum(jax.vmap(function, (0, None))(kernels, jnp.sin(x)))

        def codes(kernels):
            saved = memory.saved_residuals(loss, kernels, x).residuals
            return sum(each.dtype == "uint8" for each in saved)

        self.assertGreater(codes(kernels), 0)
        self.assertEqual(codes(kernels), codes(kernels[:1]))

    @parameterized.parameters(True, False)
    def test_a_mapped_gradient_within_another(self, detached):
        kernel = jax.random.normal(jax.random.key(0), (32, 32)) / 8
        x = jax.random.normal(jax.random.key(1), (4, 32))

        def product(kernel, x):
            return dot_general(jnp.sin(x), kernel, _PRODUCT, dropit=DropIT())

        def inner(kernel, x):
            return jnp.sum(product(kernel, product(kernel, x)) ** 2)

        program, constants = jax.closure_convert(inner, kernel, x[:1])

        def loss(kernel):
            each = jax.grad(lambda kernel, row: program(kernel, row[None], *constants))
            square = jnp.sum(jax.vmap(each, (None, 0))(kernel, x) ** 2)
            square = jax.lax.stop_gradient(square) if detached else square
            return inner(kernel, x) + square

        if not detached:
            with pytest.raises(TypeError, match="no second derivative"):
                jax.grad(loss)(kernel)
            return
        expected = jax.grad(inner)(kernel, x)
        chex.assert_trees_all_close(jax.grad(loss)(kernel), expected, rtol=1e-5)


if __name__ == "__main__":
    absltest.main()
