"""`jax.export` of our operations, as far as it takes the plain ones."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax import export

from tests.dropit_jax.operations import OPERATIONS

# Losses here have labels of one batch.
_OF_ANY_BATCH = {
    name: operation
    for name, operation in OPERATIONS.items()
    if "cross_entropy" not in name
}
_BATCHED = {"dot_product_attention": 3}


def _forward(function):
    return function


def _gradient(function):
    return jax.grad(lambda *arrays: jnp.sum(jnp.sin(function(*arrays))))


def _types(avals):
    # Symbols of two programs are equal as text alone.
    return [f"{aval.dtype}{aval.shape}" for aval in avals]


class ExportTest(parameterized.TestCase):
    @parameterized.parameters(_forward, _gradient)
    def test_for_a_gpu(self, transform):
        for name, operation in OPERATIONS.items():
            with self.subTest(name):
                step = jax.jit(transform(operation.own))
                arguments = operation.arguments("float32")
                exported = export.export(step, platforms=("cuda",))(*arguments)
                again = export.deserialize(exported.serialize())
                self.assertEqual(again.platforms, ("cuda",))
                expected = jax.eval_shape(transform(operation.plain), *arguments)
                self.assertEqual(_types(again.out_avals), _types([expected]))

    @parameterized.parameters(_forward, _gradient)
    def test_of_a_batch_of_any_size(self, transform):
        (batch,) = export.symbolic_shape("batch")
        for name, operation in _OF_ANY_BATCH.items():
            with self.subTest(name):
                types = [
                    jax.ShapeDtypeStruct(
                        (batch, *x.shape[1:]) if i < _BATCHED.get(name, 1) else x.shape,
                        x.dtype,
                    )
                    for i, x in enumerate(operation.arguments("float32"))
                ]
                exported = export.export(jax.jit(transform(operation.own)))(*types)
                again = export.deserialize(exported.serialize())
                plain = export.export(jax.jit(transform(operation.plain)))(*types)
                self.assertEqual(_types(again.out_avals), _types(plain.out_avals))

    @parameterized.parameters("dot_general_indices", "conv_mean", "gelu")
    def test_does_the_same(self, name):
        operation = OPERATIONS[name]
        arguments = operation.arguments("float32")
        (batch,) = export.symbolic_shape("batch")
        first, *others = arguments
        types = [jax.ShapeDtypeStruct((batch, *first.shape[1:]), first.dtype), *others]
        step = jax.jit(_gradient(operation.own))
        exported = export.deserialize(export.export(step)(*types).serialize())
        for x in (first, first[:1], jnp.concatenate([first, first])):
            np.testing.assert_allclose(
                exported.call(x, *others), step(x, *others), rtol=1e-4, atol=1e-5
            )


if __name__ == "__main__":
    absltest.main()
