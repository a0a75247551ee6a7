"""What XLA's CPU compiler makes of a training step: what is dropped is not kept."""

import math
import re

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

from dropit_jax import DropIT, compress, nn
from dropit_jax.products import operations

_LAYERS = 8
_SHAPE = (32, 64, 256)
_WIDTH = _SHAPE[-1]
_DENSE = 4 * math.prod(_SHAPE)
_BITS = math.prod(_SHAPE) // 8


def _temp_bytes(product, operands):
    """Temporaries of the gradient of products with ReLUs of one bit between them."""

    def loss(kernels, x):
        for kernel in kernels:
            x = nn.relu(product(x, kernel)) + x
        return jnp.sum(x**2)

    step = jax.jit(jax.grad(loss)).lower(*operands)
    return step.compile().memory_analysis().temp_size_in_bytes


def _dense(dropit):
    return lambda x, kernel: operations.dot_general(
        x, kernel, (((2,), (0,)), ((), ())), dropit=dropit
    )


def _convolution(dropit):
    return lambda x, kernel: operations.conv_general_dilated(
        x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), dropit=dropit
    )


def _operands(*kernel):
    kernels = [jax.ShapeDtypeStruct(kernel, jnp.float32)] * _LAYERS
    return kernels, jax.ShapeDtypeStruct(_SHAPE, jnp.float32)


class CpuMemoryTest(parameterized.TestCase):
    @parameterized.parameters(
        DropIT(),
        DropIT(value_dtype="bfloat16"),
        DropIT(chunk_size=64),
        DropIT(chunk_size=2**13),
        DropIT(chunk_size=300),  # chunks that do not line up
        DropIT(selection="top_k"),
        DropIT(granularity="channel"),
        DropIT(value_dtype="int8"),
        DropIT(rate=0, value_dtype="int4"),
    )
    def test_a_dense_layer_keeps_what_its_policy_keeps(self, dropit):
        self._assert_kept(_dense, dropit, _operands(_WIDTH, _WIDTH))

    @parameterized.parameters(DropIT(), DropIT(rate=0, value_dtype="int2"))
    def test_a_convolution_keeps_what_its_policy_keeps(self, dropit):
        self._assert_kept(_convolution, dropit, _operands(1, _WIDTH, _WIDTH))

    def test_but_not_what_is_rebuilt_where_others_are_between_them(self):
        def products(product, x, kernels):
            first, second, third = kernels
            between = product(jnp.cos(product(x, first)), second)
            return [between, product(x, third)]

        # Two compressions and three decompressions: what is rebuilt does not stay.
        self.assertEqual(self._calls(products), 5)

    def _calls(self, products):
        """How many calls a gradient makes."""

        def loss(kernels, x):
            results = products(_dense(DropIT()), jnp.sin(x), kernels)
            return sum(jnp.sum(result**2) for result in results)

        kernels, x = _operands(_WIDTH, _WIDTH)
        compiled = jax.jit(jax.grad(loss)).lower(kernels[:3], x).compile()
        return len(re.findall(r" call\(.*inlineable=\"false\"", compiled.as_text()))

    def _assert_kept(self, product, dropit, operands):
        """That each layer's residual is alive at the peak, and a few activations."""
        plain = _temp_bytes(product(None), operands)
        self.assertGreater(plain, (_LAYERS - 1) * _DENSE)
        x = jax.ShapeDtypeStruct(_SHAPE, jnp.float32)
        residual = jax.eval_shape(lambda x: compress(x, dropit), x).nbytes
        bound = _LAYERS * (residual + _BITS) + 7 * _DENSE
        self.assertLess(bound, 0.8 * plain)
        self.assertLess(_temp_bytes(product(dropit), operands), bound)


if __name__ == "__main__":
    absltest.main()
