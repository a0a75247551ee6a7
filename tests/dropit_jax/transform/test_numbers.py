"""Numbers that are not ordinary: NaN, infinity, masks, constants, outliers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax import lax

from dropit_jax import drop
from tests.dropit_jax.transform.comparing import error

_WIDTH = 64
_RNG = np.random.default_rng(0)
_W = jnp.asarray(_RNG.normal(size=(2, _WIDTH, _WIDTH)) / 8, jnp.float32)
_X = jnp.asarray(_RNG.normal(size=(8, _WIDTH)), jnp.float32)
# What it multiplies stays as it is, and is stored as any product.
_SAME = jnp.eye(_WIDTH, dtype=jnp.float32)
_LOSSY = ("lean", "leanest")


def _gelu(w, x):
    return jnp.sum(jax.nn.gelu(x @ w[0]) @ w[1])


def _relu(w, x):
    return jnp.sum(jax.nn.relu(x @ w[0]) @ w[1])


def _tanh(w, x):
    return jnp.sum(jnp.tanh(jnp.tanh(x @ w[0]) @ w[1]))


def _norm(w, x):
    y = x @ w[0]
    y = (y - y.mean(-1, keepdims=True)) * lax.rsqrt(y.var(-1, keepdims=True) + 1e-6)
    return jnp.sum((y @ w[1]) ** 2)


def _softmax(w, x):
    return jnp.sum(jax.nn.softmax(x @ w[0]) @ w[1])


def _scan(w, x):
    return jnp.sum(lax.scan(lambda x, w: (jax.nn.silu(x @ w), None), x, w)[0])


_FUNCTIONS = {
    function.__name__[1:]: function
    for function in (_gelu, _relu, _tanh, _norm, _softmax, _scan)
}


@functools.cache
def _gradient(function, preset=None):
    """The compiled gradient of a function, dropped if there is a preset."""
    dropped = function if preset is None else drop(function, preset)
    return jax.jit(jax.grad(dropped, argnums=(0, 1)))


def _is_finite(gradients):
    return all(bool(jnp.isfinite(leaf).all()) for leaf in gradients)


class NotFiniteTest(parameterized.TestCase):
    """What is not finite surfaces, and nothing else becomes it."""

    @parameterized.product(name=list(_FUNCTIONS), preset=["exact", "lean"])
    def test_surfaces(self, name, preset):
        function = _FUNCTIONS[name]
        plain, dropped = _gradient(function), _gradient(function, preset)
        surfaced = []
        for bad in (jnp.nan, jnp.inf, -jnp.inf):
            for w, x in (
                (_W, _X.at[3, 5].set(bad)),
                (_W.at[0, 3, 5].set(bad), _X),
                (_W.at[1, 3, 5].set(bad), _X),
            ):
                expected, found = plain(w, x), dropped(w, x)
                surfaced.append(not _is_finite(expected))
                self.assertEqual(_is_finite(found), _is_finite(expected), bad)
                # Wherever JAX has none, there is none: groups spread it, never hide it.
                for a, b in zip(found, expected, strict=True):
                    hidden = np.isfinite(a) & ~np.isfinite(b)
                    self.assertFalse(hidden.any(), bad)
        self.assertTrue(any(surfaced))

    @parameterized.parameters(*_LOSSY)
    def test_loss_scaling_takes_the_same_steps(self, preset):
        def scales(function):
            @jax.jit
            def step(w, scale):
                found = jax.grad(lambda w: scale * function(w, x))(w)
                found = found.astype(jnp.float32) / scale
                is_finite = jnp.isfinite(found).all()
                w = jnp.where(is_finite, w - 1e-3 * found.astype(w.dtype), w)
                return w, jnp.where(is_finite, scale * 2, scale / 4), is_finite

            w, scale, seen = _W.astype(jnp.float16), jnp.float16(2**7), []
            for _ in range(12):
                w, scale, is_finite = step(w, scale)
                seen.append((float(scale), bool(is_finite)))
            return seen

        x = _X.astype(jnp.float16)
        expected = scales(_gelu)
        self.assertLess(0, sum(not is_finite for _, is_finite in expected))
        self.assertLess(0, sum(is_finite for _, is_finite in expected))
        self.assertEqual(scales(drop(_gelu, preset)), expected)

    @parameterized.parameters(jnp.float16, jnp.bfloat16)
    def test_half_precision(self, dtype):
        args = _W.astype(dtype), _X.astype(dtype)
        expected = _gradient(_norm)(*args)
        found = _gradient(_norm, "lean")(*args)
        self.assertTrue(_is_finite(found))
        self.assertLess(error(found, expected), 0.02)

    def test_the_largest_of_float16(self):
        w = jnp.stack([_SAME, _SAME]).astype(jnp.float16)
        largest = jnp.finfo(jnp.float16).max
        x = _X.astype(jnp.float16).at[0, 0].set(largest).at[1, 1].set(-largest)

        def function(w, x):
            return jnp.sum((jax.nn.silu(x @ w[0]) * jnp.float16(1e-4)) @ w[1])

        self.assertTrue(_is_finite(_gradient(function)(w, x)))
        for preset in _LOSSY:
            self.assertTrue(_is_finite(_gradient(function, preset)(w, x)))


_CAUSAL = np.tril(np.ones((8, 8), bool))
_LOWEST = float(jnp.finfo(jnp.float32).min)
_MASKED = {
    "of_1e9": lambda s: jax.nn.softmax(jnp.where(_CAUSAL, s, -1e9)),
    "lowest": lambda s: jax.nn.softmax(jnp.where(_CAUSAL, s, _LOWEST)),
    "infinite": lambda s: jax.nn.softmax(jnp.where(_CAUSAL, s, -jnp.inf)),
    "where_of_softmax": lambda s: jax.nn.softmax(s, where=_CAUSAL),
    "added": lambda s: jax.nn.softmax(s + np.where(_CAUSAL, 0, np.float32(-1e9))),
    "of_log_softmax": lambda s: jnp.exp(
        jax.nn.log_softmax(jnp.where(_CAUSAL, s, -jnp.inf))
    ),
    "of_exp": lambda s: jnp.exp(jnp.where(_CAUSAL, s, -1e9)),
    "of_sigmoid": lambda s: jax.nn.sigmoid(jnp.where(_CAUSAL, s, _LOWEST)),
}


def _attention(name, w, x):
    query, value = x @ w[0], x @ w[1]
    weights = _MASKED[name](query @ query.T / 32)
    return jnp.sum((weights @ value) ** 2)


# Half of the channels are masked.
_OPEN = np.arange(_WIDTH) % 2 == 0
_ACTIVATIONS = {
    "softmax": jax.nn.softmax,
    "sigmoid": jax.nn.sigmoid,
    "gelu": jax.nn.gelu,
    "elu": jax.nn.elu,
    "largest": lambda h: jnp.sin(h) * jnp.max(h, axis=-1, keepdims=True),
}


class MaskTest(parameterized.TestCase):
    """Beside the numbers of a mask, which have no gradient, others keep theirs."""

    @parameterized.parameters(*_MASKED)
    def test_of_attention(self, name):
        self._assert_near(functools.partial(_attention, name), "lean", 0.02)

    def test_of_attention_in_four_bits(self):
        self._assert_near(functools.partial(_attention, "infinite"), "leanest", 0.3)

    @parameterized.parameters(
        *[(name, -1e9) for name in _ACTIVATIONS],
        ("gelu", _LOWEST / 2),
    )
    def test_of_channels(self, name, low):
        def function(w, x):
            hidden = jnp.where(_OPEN, x @ w[0], low)
            return jnp.sum((_ACTIVATIONS[name](hidden) * _OPEN) @ w[1] ** 2)

        self._assert_near(function, "lean", 0.02)

    @parameterized.parameters("elu", "gelu", "largest")
    def test_that_is_an_array(self, name):
        """A mask that is added: an argument, whose numbers no plan sees; a constant."""
        mask = np.where(_OPEN, 0, np.float32(-1e9))

        def of_argument(w, x, mask=mask):
            hidden = x @ w[0] + mask
            return jnp.sum((_ACTIVATIONS[name](hidden) * _OPEN) @ w[1] ** 2)

        def of_constant(w, x):
            return of_argument(w, x)

        expected = _gradient(of_constant)(_W, _X)
        for found in (
            _gradient(of_argument, "lean")(_W, _X, jnp.asarray(mask)),
            _gradient(of_constant, "lean")(_W, _X),
        ):
            self.assertLess(error(found, expected), 0.02)

    def _assert_near(self, function, preset, bound):
        expected = _gradient(function)(_W, _X)
        self.assertTrue(_is_finite(expected))
        self.assertLess(error(_gradient(function, preset)(_W, _X), expected), bound)


_LEVELS = {"lean": 255, "leanest": 15}
_COTANGENT = jnp.asarray(_RNG.normal(size=_X.shape), jnp.float32)


def _activation(w, x):
    return jnp.sum(jax.nn.silu(x @ w) * _COTANGENT)


def _kernel(w, x):
    return jnp.sum(((x @ _SAME) @ w) * _COTANGENT)


_GROUPS = {
    "constant": np.full((8, _WIDTH), 3.7),
    "zero": np.zeros((8, _WIDTH)),
    "constant_rows": np.linspace(-3, 3, 8)[:, None] * np.ones((1, _WIDTH)),
    "subnormal": np.full((8, _WIDTH), 1e-40) * np.arange(_WIDTH),
    "tiny": 1e-30 * np.asarray(_X),
    "huge": 1e30 * np.asarray(_X),
    "outlier": np.where(np.arange(_WIDTH) == 7, 100, np.asarray(_X)),
    "far_from_zero": 50 + np.asarray(_X),
}


def _ranges(x):
    """How far each row reaches: with 64 elements, a group."""
    return np.asarray(x.max(-1, keepdims=True) - x.min(-1, keepdims=True), np.float64)


class GroupTest(parameterized.TestCase):
    """An element is wrong by half a step of its group; the gradients follow from it.

    A step is the range of the group in so many levels, and a little more, as ranges are
    kept in bfloat16.
    """

    def _half_steps(self, x, preset):
        # bfloat16 has 8 bits of a number, of the smallest and of the range.
        rounding = 2.0**-7
        largest = np.abs(np.asarray(x, np.float64)).max(-1, keepdims=True)
        step = (_ranges(x) * (1 + rounding) + largest * rounding) / _LEVELS[preset]
        return 0.5 * step * (1 + rounding) + np.finfo(np.float32).tiny

    @parameterized.product(name=list(_GROUPS), preset=_LOSSY)
    def test_an_activations_derivative(self, name, preset):
        x = jnp.asarray(_GROUPS[name], jnp.float32)
        _, expected = _gradient(_activation)(_SAME, x)
        _, found = _gradient(_activation, preset)(_SAME, x)
        # The second derivative of silu is nowhere larger than 1/2.
        bound = 0.5 * self._half_steps(x, preset) * np.abs(_COTANGENT) + 1e-6
        self.assertTrue(_is_finite([found]))
        np.testing.assert_array_less(np.abs(found - expected), bound)

    @parameterized.product(name=list(_GROUPS), preset=_LOSSY)
    def test_a_kernels_gradient(self, name, preset):
        x = jnp.asarray(_GROUPS[name], jnp.float32)
        expected, _ = _gradient(_kernel)(_SAME, x)
        found, _ = _gradient(_kernel, preset)(_SAME, x)
        half_steps = np.broadcast_to(self._half_steps(x, preset), x.shape)
        size, cotangent = (np.abs(np.asarray(a, np.float64)) for a in (x, _COTANGENT))
        bound = half_steps.T @ cotangent + 1e-5 * size.T @ cotangent + 1e-37
        self.assertTrue(_is_finite([found]))
        np.testing.assert_array_less(np.abs(found - expected), bound)


_LABELS = jax.nn.one_hot(np.arange(8) * 7 % _WIDTH, _WIDTH)
_STEEP = {
    "cross_entropy_with_epsilon": lambda h: (
        -jnp.sum(_LABELS * jnp.log(jax.nn.softmax(3 * h) + 1e-9))
    ),
    "log_of_exp": lambda h: jnp.sum(jnp.sin(jnp.log(jnp.exp(2 * h)))),
    "root": lambda h: jnp.sum(jnp.sqrt(jax.nn.relu(h) + 1e-6)),
    "reciprocal": lambda h: jnp.sum(1 / (1e-2 + h**2)),
    "arccos": lambda h: jnp.sum(jnp.arccos(0.999 * jnp.tanh(3 * h))),
    "arctan2": lambda h: jnp.sum(jnp.arctan2(h, jnp.roll(h, 1, 1))),
}


def _matrix(w):
    """Symmetric, of condition 4e3."""
    w = jnp.tanh(w[0])
    return w @ w.T + 1e-3 * _SAME


_SOLVED = {
    "solve": lambda w, x: jnp.sum(jnp.linalg.solve(_matrix(w), jnp.sin(x.T)) ** 2),
    "cholesky": lambda w, x: jnp.sum(
        jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(_matrix(w)), True), x.T) ** 2
    ),
}


class SteepTest(parameterized.TestCase):
    """What multiplies a small error of its operand by much is given an exact one."""

    @parameterized.parameters(*_STEEP)
    def test_where_an_operand_is_small(self, name):
        def function(w, x):
            return _STEEP[name](4 * (jnp.tanh(x @ w[0]) @ w[1]))

        self._assert_near(function)

    @parameterized.parameters(*_SOLVED)
    def test_systems_of_equations(self, name):
        self._assert_near(_SOLVED[name])

    def _assert_near(self, function):
        expected = _gradient(function)(_W, _X)
        found = _gradient(function, "lean")(_W, _X)
        self.assertTrue(_is_finite(expected))
        self.assertLess(error(found, expected), 0.05)


if __name__ == "__main__":
    absltest.main()
