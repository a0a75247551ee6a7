"""What XLA's GPU compiler puts around the kernels in a training step: nothing.

And how often the gradients of norms, ReLU and pooling pass over activations.

That a compression fused with a ReLU's bits, or a decompression into another layout,
would save nothing is read off here.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

import dropit_jax
from dropit_jax import linen as dn
from dropit_jax.memory.compiled import hlo
from tests.dropit_jax import gpu_programs

_FEATURES = 64
_SHAPE = (16, 32, 32, _FEATURES)
_FREE = ("bitcast", "optimization-barrier")

# Without it XLA reads float32 images as (batch, channels, height, width) on cards
# before Hopper.
_CHANNELS_LAST = {"xla_gpu_force_conv_nhwc": True}


class _Net(nn.Module):
    """Convolution, norm and ReLU, twice, and a dense layer."""

    dtype: str

    @nn.compact
    def __call__(self, x):
        policy = dropit_jax.DropIT(value_dtype="bfloat16")
        norm = functools.partial(nn.BatchNorm, use_running_average=False)
        for _ in range(2):
            x = dn.Conv(_FEATURES, (3, 3), dtype=self.dtype, dropit=policy)(x)
            x = dropit_jax.nn.relu(norm(dtype=self.dtype)(x))
        return dn.Dense(256, dtype=self.dtype, dropit=policy)(x)


def _compiled(target, dtype, options):
    """The training step of the net."""
    net, x = _Net(dtype), jax.ShapeDtypeStruct(_SHAPE, dtype)
    variables = jax.eval_shape(net.init, jax.random.key(0), x)

    def step(variables, x):
        def loss(params):
            given = variables | {"params": params}
            out, _ = net.apply(given, x, mutable=["batch_stats"])
            return (out.astype(jnp.float32) ** 2).sum()

        return jax.grad(loss)(variables["params"])

    _, text = gpu_programs.compiled(step, (variables, x), target, options)
    return hlo.parse(text)


def _source(program, name):
    """The instruction that writes the array which another is a view of."""
    element = 0
    while True:
        found = program.homes[name][name]
        if found.opcode == "get-tuple-element":
            element, name = found.element, found.operands[0]
        elif found.opcode == "tuple":
            name = found.operands[element]
        elif found.opcode in _FREE:
            name = found.operands[0]
        else:
            return found


def _is_kernel(instruction):
    return "__gpu$xla.gpu.triton" in instruction.attributes


def _weight_gradients(program):
    """The convolutions and the product that read what was decompressed."""
    entry = program.computations[program.entry].values()
    convolutions = [i for i in entry if "convBackwardFilter" in i.attributes]
    products = [
        i
        for i in entry
        if "__cublas" in i.attributes
        and (_FEATURES, 256) in [a.shape for a in i.results]
    ]
    return convolutions + products


class KernelsInStepTest(parameterized.TestCase):
    @parameterized.parameters(
        ("h100", "float32", {}),
        ("a5000", "bfloat16", {}),
        ("a100", "float32", _CHANNELS_LAST),
    )
    def test_nothing_is_moved_for_them(self, target, dtype, options):
        program = _compiled(target, dtype, options)
        gradients = _weight_gradients(program)
        self.assertLen(gradients, 3)
        for gradient in gradients:
            self.assertTrue(_is_kernel(_source(program, gradient.operands[0])))
        entry = program.computations[program.entry].values()
        kernels = [i for i in entry if _is_kernel(i)]
        self.assertLen(kernels, 6)
        # What is compressed is written by what computes it, and so are a ReLU's bits.
        compressed = [_source(program, i.operands[0]) for i in kernels[:3]]
        self.assertEqual(compressed[0].opcode, "parameter")
        bits = (*_SHAPE[:-1], _FEATURES // 8)
        for relu in compressed[1:]:
            self.assertEqual(relu.opcode, "fusion")
            self.assertIn(hlo.ArrayType(dtype, _SHAPE), relu.results)
            self.assertIn(hlo.ArrayType("uint8", bits), relu.results)

    def test_before_hopper_float32_takes_an_option(self):
        program = _compiled("a100", "float32", {})
        sources = [
            _source(program, gradient.operands[0])
            for gradient in _weight_gradients(program)
        ]
        self.assertFalse(all(map(_is_kernel, sources)))


_IMAGES = (8, 56, 56, 64)


def _written(function):
    """How many float32 images the function and its gradient write, and all they do."""

    def step(x, cotangent):
        y, pullback = jax.vjp(function, x)
        return y, pullback(cotangent)

    x = jax.ShapeDtypeStruct(_IMAGES, "float32")
    y = jax.eval_shape(function, x)
    _, text = gpu_programs.compiled(step, (x, y))
    program = hlo.parse(text)
    work = [
        instruction
        for instruction in program.computations[program.entry].values()
        if instruction.opcode not in (*_FREE, "parameter", "tuple", "get-tuple-element")
    ]
    written = [result for instruction in work for result in instruction.results]
    return written.count(hlo.ArrayType("float32", _IMAGES)), text


class PassesOverActivationsTest(parameterized.TestCase):
    def test_the_gradient_of_relu_and_pooling_is_all_that_is_written(self):
        @functools.partial(dropit_jax.drop, preset="exact")
        def function(x):
            return nn.max_pool(nn.relu(x), (3, 3), (2, 2), "SAME")

        written, text = _written(function)
        self.assertEqual(written, 1)
        self.assertNotIn("scatter", text)


if __name__ == "__main__":
    absltest.main()
