"""Under JAX's switches: where the plain operation passes, ours does too."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax import lax

from dropit_jax import nn
from tests.dropit_jax.operations import OPERATIONS

# Traced where leaks are looked for, which takes long.
_FEW = ("gelu", "Dense")
# Of which each operation is compiled by itself, for long. (Indices are those of Dense,
# random choices those of ConvTranspose.)
_ALIKE = (
    *("dot_general_bitmap", "dot_general_int4", "swish", "relu6"),
    *("dot_general_indices", "dot_general_random"),
)
# Of which all operations are compiled once, under both of the eager switches.
_LONG = (
    *("conv_mean", "dot_general_int8", "ConvTranspose"),
    "MultiHeadDotProductAttention",
)
_DTYPES = {
    "strict": ("float32", "bfloat16", "float16"),
    "x64": ("float32", "bfloat16", "float16", "float64"),
}


def _nans():
    return jax.debug_nans(True)


def _gradients(function):
    def loss(*arrays):
        return jnp.sum(jnp.sin(function(*arrays).astype(jnp.float32)))

    def gradients(*arrays):
        return jax.value_and_grad(loss, argnums=range(len(arrays)))(*arrays)

    return gradients


class TracedTest(parameterized.TestCase):
    @parameterized.named_parameters(
        (f"{switch}_{dtype}", switch, dtype)
        for switch in ("rank", "strict", "x64", "leaks")
        for dtype in _DTYPES.get(switch, ("float32",))
    )
    def test_traces_where_the_plain_one_does(self, switch, dtype):
        passed = 0
        names = _FEW if switch == "leaks" else OPERATIONS
        for name in names:
            operation = OPERATIONS[name]
            with _switched(switch):
                arguments = operation.arguments(dtype)
                try:
                    jax.make_jaxpr(_gradients(operation.plain))(*arguments)
                except ValueError:  # Flax's norms of 16 bits do not
                    continue
                with self.subTest(name):
                    jaxpr = jax.make_jaxpr(_gradients(operation.own))(*arguments)
                    dtypes = [aval.dtype for aval in jaxpr.out_avals[1:]]
                    self.assertEqual(dtypes, [x.dtype for x in arguments])
                    passed += 1
        self.assertGreater(passed, 0.8 * len(names))


def _switched(name):
    if name == "rank":
        return jax.numpy_rank_promotion("raise")
    if name == "strict":
        return jax.numpy_dtype_promotion("strict")
    if name == "x64":
        return jax.enable_x64(True)
    return jax.checking_leaks()


class EagerTest(parameterized.TestCase):
    @parameterized.named_parameters(
        (name, name)
        for name in OPERATIONS
        if name not in _ALIKE and (name == "conv_mean" or not name.startswith("conv_"))
    )
    def test_run_one_by_one(self, name):
        operation = OPERATIONS[name]
        arguments = operation.arguments("float32")
        own = _gradients(operation.own)
        expected = jax.jit(own)(*arguments)
        each = ((jax.disable_jit,), (_nans,))
        for switches in ((_nans, jax.disable_jit),) if name in _LONG else each:
            with contextlib.ExitStack() as stack:
                for switch in switches:
                    stack.enter_context(switch())
                found = own(*arguments)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5),
                found,
                expected,
            )


class DebugNansTest(parameterized.TestCase):
    @parameterized.parameters("gelu", "sigmoid", "silu", "tanh")
    def test_the_culprit_is_named(self, name):
        def loss(x):
            return jnp.sum(getattr(nn, name)(x) * lax.log(x))

        with jax.debug_nans(True), contextlib.ExitStack() as stack:
            error = stack.enter_context(pytest.raises(FloatingPointError))
            jax.jit(jax.grad(loss))(-jnp.ones(4))
        self.assertIn("log", str(error.value))


if __name__ == "__main__":
    absltest.main()
