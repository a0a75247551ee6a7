"""Programs that nobody wrote: `drop` has the plain function's gradient."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax import lax

from dropit_jax import drop, plan

_SHAPE = (6, 16)

# Functions of an array, another one, and a parameter (16, 16).
_OPERATIONS = {
    "tanh": lambda x, y, w: jnp.tanh(x),
    "sin": lambda x, y, w: jnp.sin(x),
    "exp": lambda x, y, w: jnp.exp(jnp.tanh(x)),
    "relu": lambda x, y, w: jax.nn.relu(x),
    "gelu": lambda x, y, w: jax.nn.gelu(x),
    "silu": lambda x, y, w: jax.nn.silu(x),
    "abs": lambda x, y, w: jnp.abs(x),
    "root": lambda x, y, w: jnp.sqrt(1 + x**2),
    "add": lambda x, y, w: x + y,
    "mul": lambda x, y, w: x * y,
    "div": lambda x, y, w: x / (1 + y**2),
    "max": lambda x, y, w: jnp.maximum(x, y),
    "where": lambda x, y, w: jnp.where(x > y, x, 0.1 * y),
    "product": lambda x, y, w: x @ w,
    "gram": lambda x, y, w: (x @ y.T) @ jnp.tanh(y) / 8,
    "einsum": lambda x, y, w: jnp.einsum("ac,cd,ad->ac", x, w, y) / 4,
    "norm": lambda x, y, w: (
        (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 0.1)
    ),
    "softmax": lambda x, y, w: jax.nn.softmax(x) * 4,
    "logsumexp": lambda x, y, w: x - jax.nn.logsumexp(y, axis=0),
    "reshape": lambda x, y, w: x.reshape(16, 6).T.reshape(_SHAPE),
    "flip": lambda x, y, w: jnp.concatenate([x[:, 8:], x[:, :8]], axis=1),
    "gather": lambda x, y, w: x[jnp.argsort(y[:, 0])],
    "sort": lambda x, y, w: jnp.sort(x, axis=-1),
    "argmax": lambda x, y, w: x.at[jnp.arange(6), jnp.argmax(y, axis=1)].add(1.0),
    "cumsum": lambda x, y, w: jnp.cumsum(x, axis=0) / 4,
    "stop": lambda x, y, w: x * lax.stop_gradient(y),
    "scan": lambda x, y, w: lax.scan(lambda c, r: (jnp.tanh(c @ w + r), c), x, y[:3])[
        0
    ],
    "stacked": lambda x, y, w: lax.scan(lambda c, r: (c + r, jnp.sin(r)), x[0], y)[1],
    "cond": lambda x, y, w: lax.cond(x[0, 0] > 0, jnp.sin, lambda x: x @ w, x),
    "checkpoint": lambda x, y, w: jax.checkpoint(lambda x: jnp.tanh(x @ w) * x)(x),
    "map": lambda x, y, w: lax.map(lambda row: jnp.sin(row @ w), x),
}


def _function(steps):
    """The function that these operations make: (name, operand, operand, parameter)."""

    def function(params, x):
        made = [x]
        for name, first, second, which in steps:
            a, b = made[first % len(made)], made[second % len(made)]
            made.append(_OPERATIONS[name](a, b, params[which]))
        return sum(jnp.sum(jnp.sin(y)) for y in made[-2:])

    return function


_STEPS = st.lists(
    st.tuples(
        st.sampled_from(sorted(_OPERATIONS)),
        st.integers(0, 7),
        st.integers(0, 7),
        st.integers(0, 2),
    ),
    min_size=2,
    max_size=8,
)


def _arguments(seed, dtype):
    rng = np.random.default_rng(seed)
    return (
        jnp.asarray(rng.normal(size=(3, 16, 16)) / 4, dtype),
        jnp.asarray(rng.normal(size=_SHAPE), dtype),
    )


def _gradient(function, args):
    gradients = jax.jit(jax.grad(function, argnums=(0, 1)))(*args)
    return np.concatenate([np.ravel(leaf) for leaf in gradients])


class RandomProgramTest(parameterized.TestCase):
    @hypothesis.given(steps=_STEPS, seed=st.integers(0, 2**16))
    @hypothesis.settings(max_examples=30)
    def test_exact_is_jaxs_gradient(self, steps, seed):
        with jax.enable_x64(True):
            function, args = _function(steps), _arguments(seed, jnp.float64)
            expected = _gradient(function, args)
            found = _gradient(drop(function, "exact"), args)
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
            planned = plan(function, "exact", argnums=(0, 1))(*args)
            self.assertLessEqual(planned.nbytes, planned.plain_bytes)

    def test_every_operation_alone(self):
        for name in _OPERATIONS:
            steps = [("product", 0, 0, 0), (name, 1, 0, 1), ("product", 2, 0, 2)]
            function, args = _function(steps), _arguments(0, jnp.float32)
            expected = _gradient(function, args)
            for preset, bound in (("exact", 1e-5), ("lean", 0.05)):
                found = _gradient(drop(function, preset), args)
                error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
                self.assertLess(error, bound, (name, preset))


if __name__ == "__main__":
    absltest.main()
