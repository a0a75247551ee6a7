"""What the tests of `flax.nnx` run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from dropit_jax import memory
from tests.dropit_jax import reference


def numbers(*shape):
    x = np.random.default_rng(0).normal(size=shape)
    return jnp.asarray(np.round(x, 1), jnp.float32)  # with ties


def params(model):
    return nnx.state(model, nnx.Param)


def run(layers, *inputs, **options):
    """For each layer its output, and the gradients of its parameters and inputs.

    All are one program: it takes less time to compile.
    """
    graphs, params, others = zip(
        *(nnx.split(layer, nnx.Param, ...) for layer in layers), strict=True
    )

    def run_one(graph, params, rest, inputs):
        def call(params, *inputs):
            return nnx.merge(graph, params, rest, copy=True)(*inputs, **options)

        out, pullback = jax.vjp(call, params, *inputs)
        cotangent = jnp.cos(jnp.arange(out.size)).reshape(out.shape)
        to_params, *to_inputs = pullback(cotangent.astype(out.dtype))
        return out, nnx.to_pure_dict(to_params), to_inputs

    @jax.jit
    def run(params, others, inputs):
        parts = zip(graphs, params, others, strict=True)
        return [run_one(*part, inputs) for part in parts]

    return run(params, others, inputs)


def cached_bytes(model, *inputs):
    """Bytes cached by a model for its gradients."""
    graph, state = nnx.split(model)

    def gradients(state, inputs):
        return nnx.grad(lambda m: m(*inputs).sum())(nnx.merge(graph, state))

    return memory.cached_bytes(gradients, state, inputs)


def train(model, loss_fn, steps):
    """The losses of some steps."""
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, gradients)
        return loss

    return [float(step(model, optimizer)) for _ in range(steps)]


def residual_bytes(shape, itemsize=4):
    """Bytes of what `DropIT(0.5)` keeps of a tensor that its chunks of 16 divide."""
    size = np.prod(shape)
    return size // 2 * itemsize + min(reference.position_bytes(shape, 0.5, 16))
