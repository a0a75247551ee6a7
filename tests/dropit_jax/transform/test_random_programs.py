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


def _sampled_steps(seed):
    """Steps drawn evenly: Hypothesis prefers programs that store next to nothing."""
    rng, names = np.random.default_rng(seed), sorted(_OPERATIONS)
    return [
        (names[rng.integers(len(names))], *map(int, rng.integers((8, 8, 3))))
        for _ in range(rng.integers(2, 9))
    ]


def _arguments(seed, dtype):
    rng = np.random.default_rng(seed)
    return (
        jnp.asarray(rng.normal(size=(3, 16, 16)) / 4, dtype),
        jnp.asarray(rng.normal(size=_SHAPE), dtype),
    )


def _rounded(array):
    """The array as 8 bits with a minimum and a scale of each row hold it."""
    low, high = (f(array, axis=-1, keepdims=True) for f in (np.min, np.max))
    step = (high - low) / 255
    return jnp.asarray(np.round((array - low) / step) * step + low, array.dtype)


def _gradients(*functions):
    """The compiled function of arguments that returns the gradients of each."""

    @jax.jit
    def of_each(*args):
        found = [jax.grad(function, argnums=(0, 1))(*args) for function in functions]
        return [jnp.concatenate([jnp.ravel(leaf) for leaf in each]) for each in found]

    return of_each


def _distance(found, expected):
    return np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30)


class RandomProgramTest(parameterized.TestCase):
    @hypothesis.given(steps=_STEPS, seed=st.integers(0, 2**16))
    @hypothesis.settings(max_examples=30)
    def test_exact_is_jaxs_gradient(self, steps, seed):
        with jax.enable_x64(True):
            function, args = _function(steps), _arguments(seed, jnp.float64)
            found, expected = _gradients(drop(function, "exact"), function)(*args)
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
            planned = plan(function, "exact", argnums=(0, 1))(*args)
            self.assertLessEqual(planned.nbytes, planned.plain_bytes)

    def test_lean_is_near(self):
        """A program's error is bounded by what rounding its arguments does to it.

        A function may be so curved that 8 bits of anything turn its gradient: one in a
        hundred of these is, such as the sine of a large square. So the yardstick is
        the plain function of arguments in 8 bits. Of all errors the median is small.
        """
        errors = []
        for seed in range(20):
            steps = _sampled_steps(seed)
            function, args = _function(steps), _arguments(seed, jnp.float32)
            gradients = _gradients(drop(function, "lean"), function)
            found, expected = gradients(*args)
            _, of_rounded = gradients(*map(_rounded, args))
            error = _distance(found, expected)
            bound = 0.01 + 4 * _distance(of_rounded, expected)
            self.assertLess(error, bound, steps)
            if error > 1e-5:  # something is stored in 8 bits
                errors.append(error)
        self.assertGreater(len(errors), 10)
        self.assertLess(np.median(errors), 0.02)

    @parameterized.parameters(*_OPERATIONS)
    def test_an_operation_alone(self, name):
        steps = [("product", 0, 0, 0), (name, 1, 0, 1)]
        function, args = _function(steps), _arguments(0, jnp.float32)
        found, expected = _gradients(drop(function, "lean"), function)(*args)
        self.assertLess(_distance(found, expected), 0.02)


if __name__ == "__main__":
    absltest.main()
