"""Effects, random numbers and references: those of the plain function, as often."""

import collections
import contextlib
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import io_callback
from jax.extend.core import jaxprs_in_params

from dropit_jax import drop

_RNG = np.random.default_rng(0)
_W = jnp.asarray(_RNG.normal(size=(3, 16, 16)) / 4, jnp.float32)
_X = jnp.asarray(_RNG.normal(size=(8, 16)), jnp.float32)
_PRESETS = ("exact", "lean")


class _Log:
    """What reached the host, by the kind of effect, in order."""

    def __init__(self, *, recomputed=False):
        self.seen = collections.defaultdict(list)
        self._kinds = [("debug", False), ("debug", True)]
        # JAX has no derivative of a checkpoint with the others in it.
        if not recomputed:
            self._kinds += [("io", False), ("io", True)]

    def __call__(self, x):
        value = lax.stop_gradient(jnp.sum(x))
        for kind, ordered in self._kinds:
            seen = self.seen[kind, ordered]
            if kind == "debug":
                jax.debug.callback(seen.append, value, ordered=ordered)
            else:
                io_callback(seen.append, None, value, ordered=ordered)

    def results(self):
        """What was seen; where JAX keeps no order, sorted."""
        return {
            (kind, ordered): np.array(seen if ordered else sorted(seen))
            for (kind, ordered), seen in self.seen.items()
        }


def _layer(x, w, emit):
    x = jnp.tanh(x @ w)
    emit(x)
    return jnp.sin(x)


def _in_the_function(emit, w, x):
    return jnp.sum(_layer(x, w[0], emit) @ w[1])


def _in_jit(emit, w, x):
    return jnp.sum(jax.jit(lambda x: _layer(x, w[0], emit))(x) @ w[1])


def _in_scan(emit, w, x):
    return jnp.sum(lax.scan(lambda x, w: (_layer(x, w, emit), None), x, w)[0])


def _in_while(emit, w, x):
    def turn(n):
        emit(1.0 * n)
        return n + 1

    return jnp.sum(jnp.sin(x @ w[0])) * lax.while_loop(lambda n: n < 3, turn, 0)


def _in_cond(emit, w, x):
    y = lax.cond(x[0, 0] < 9, lambda x: _layer(x, w[0], emit), jnp.cos, jnp.sin(x))
    return jnp.sum(y @ w[1])


def _in_checkpoint(emit, w, x):
    block = jax.checkpoint(lambda x, w: _layer(x, w, emit))
    return jnp.sum(block(jnp.sin(x), w[0]) @ w[1])


def _in_checkpoint_in_scan(emit, w, x):
    block = jax.checkpoint(lambda x, w: (_layer(x, w, emit), None))
    return jnp.sum(lax.scan(block, x, w)[0] ** 2)


def _in_custom_vjp(emit, w, x):
    @jax.custom_vjp
    def layer(x, w):
        return _layer(x, w, emit)

    def forward(x, w):
        y = x @ w
        emit(y)
        return jnp.sin(y), (x, w, y)

    def backward(saved, g):
        x, w, y = saved
        g = g * jnp.cos(y)
        emit(g)
        return g @ w.T, x.T @ g

    layer.defvjp(forward, backward)
    return jnp.sum(layer(jnp.tanh(x), w[0]) @ w[1])


_PLACES = {
    function.__name__[1:]: function
    for function in (
        _in_the_function,
        _in_jit,
        _in_scan,
        _in_while,
        _in_cond,
        _in_checkpoint,
        _in_checkpoint_in_scan,
        _in_custom_vjp,
    )
}


def _gradient(function, *args, jit=True):
    gradient = jax.value_and_grad(function)
    found = jax.block_until_ready((jax.jit(gradient) if jit else gradient)(*args))
    jax.effects_barrier()
    return found


@functools.cache
def _effects(place, preset, *, jit):
    log = _Log(recomputed="checkpoint" in place)

    def function(w, x):
        return _PLACES[place](log, w, x)

    _gradient(drop(function, preset) if preset else function, _W, _X, jit=jit)
    return log.results()


class EffectTest(parameterized.TestCase):
    def _assert_same_effects(self, place, preset, *, jit):
        expected = _effects(place, None, jit=jit)
        found = _effects(place, preset, jit=jit)
        self.assertGreater(len(expected["debug", True]), 0)
        self.assertEqual(found.keys(), expected.keys())
        for kind, values in expected.items():
            # What is computed again of codes is near.
            tolerance = 1e-5 if preset == "exact" else 0.05
            np.testing.assert_allclose(
                found[kind], values, tolerance, tolerance, err_msg=str(kind)
            )

    @parameterized.product(place=list(_PLACES), preset=_PRESETS)
    def test_jitted(self, place, preset):
        self._assert_same_effects(place, preset, jit=True)

    @parameterized.parameters("in_the_function", "in_checkpoint")
    def test_eagerly(self, place):
        self._assert_same_effects(place, "exact", jit=False)

    def test_not_differentiated(self):
        log = _Log()
        jax.jit(drop(lambda w, x: _in_scan(log, w, x)))(_W, _X)
        jax.effects_barrier()
        for seen in log.seen.values():
            self.assertLen(seen, 3)

    @parameterized.parameters("in_scan", "in_checkpoint")
    def test_debug_print(self, place):
        def printed(transform):
            def emit(x):
                jax.debug.print("at {}", jnp.round(jnp.sum(x), 1))

            text = io.StringIO()
            with contextlib.redirect_stdout(text):
                _gradient(transform(lambda w, x: _PLACES[place](emit, w, x)), _W, _X)
            return sorted(text.getvalue().splitlines())

        expected = printed(lambda f: f)
        self.assertGreater(len(expected), 1)
        self.assertEqual(printed(lambda f: drop(f, "exact")), expected)


class PureCallbackTest(parameterized.TestCase):
    """A pure function of the host runs as often as in the plain function."""

    @parameterized.parameters("straight", "scan", "checkpoint")
    def test_calls(self, place):
        calls = []

        def on_the_host(x):
            calls.append(x)
            return np.sin(x)

        @jax.custom_jvp
        def sin(x):
            shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
            return jax.pure_callback(on_the_host, shape, x, vmap_method="expand_dims")

        sin.defjvp(lambda p, t: (sin(p[0]), jnp.cos(p[0]) * t[0]))

        def function(w, x):
            if place == "scan":
                return jnp.sum(lax.scan(lambda x, w: (sin(x @ w), None), x, w)[0])
            block = jax.checkpoint(sin) if place == "checkpoint" else sin
            return jnp.sum(jnp.sin(block(x @ w[0])) @ w[1])

        counts = []
        for f in (function, *(drop(function, preset) for preset in _PRESETS)):
            calls.clear()
            _gradient(f, _W, _X)
            counts.append(len(calls))
        self.assertGreater(counts[0], 0)
        self.assertEqual(counts, [counts[0]] * 3)


def _dropout(x, key):
    kept = jax.random.bernoulli(key, 0.7, x.shape)
    return jnp.where(kept, x / 0.7, 0)


def _unrolled_dropout(w, x, key):
    for i in range(3):
        x = _dropout(jnp.tanh(x @ w[i]), jax.random.fold_in(key, i))
    return jnp.sum(x**2)


def _scanned_dropout(w, x, key):
    def turn(carry, w):
        x, key = carry
        key, own = jax.random.split(key)
        return (_dropout(jnp.tanh(x @ w), own), key), None

    return jnp.sum(lax.scan(turn, (x, key), w)[0][0] ** 2)


def _checkpointed_dropout(w, x, key):
    block = jax.checkpoint(lambda x, w, key: _dropout(jnp.tanh(x @ w), key))
    for i in range(2):
        x = block(x, w[i], jax.random.fold_in(key, i))
    return jnp.sum(x**2)


def _count(jaxpr):
    """How often each primitive that draws or makes keys stands in a program."""
    found = collections.Counter()
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name = equation.primitive.name
        if name.startswith(("random_", "threefry", "rng_")):
            found[name] += 1
        for inner in jaxprs_in_params(equation.params):
            found += _count(inner)
    return found


class RandomTest(parameterized.TestCase):
    @parameterized.parameters(
        (_unrolled_dropout, jax.random.key),
        (_scanned_dropout, jax.random.key),
        (_scanned_dropout, jax.random.PRNGKey),
        (_checkpointed_dropout, jax.random.PRNGKey),
    )
    def test_numbers_are_drawn_as_in_the_plain_function(self, function, make_key):
        args = _W, _X, make_key(0)
        gradients = [
            jax.jit(jax.grad(f))
            for f in (function, *(drop(function, preset) for preset in _PRESETS))
        ]
        plain, *dropped = (_count(each.trace(*args).jaxpr) for each in gradients)
        self.assertGreater(plain["random_bits"], 0)
        self.assertEqual(dropped, [plain, plain])
        run = jax.jit(lambda *args: [gradient(*args) for gradient in gradients])
        expected, *found_by_preset = run(*args)
        # Had the backward pass other masks, half of this would be wrong.
        for preset, bound, found in zip(
            _PRESETS, (1e-6, 0.02), found_by_preset, strict=True
        ):
            error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
            self.assertLess(error, bound, preset)


class ReferenceTest(parameterized.TestCase):
    """What a function writes into a mutable reference is there, once."""

    @parameterized.product(preset=_PRESETS, jit=[False, True])
    def test_that_is_an_argument(self, preset, jit):
        def function(w, x, total):
            y = jnp.tanh(x @ w[0])
            total[...] += lax.stop_gradient(jnp.sum(y))
            return jnp.sum(jnp.sin(y) @ w[1])

        totals = []
        for f in (function, drop(function, preset)):
            total = jax.new_ref(jnp.ones(()))
            _gradient(f, _W, _X, total, jit=jit)
            totals.append(total[...])
        self.assertNotEqual(totals[0], 1)
        np.testing.assert_allclose(totals[1], totals[0], rtol=1e-6)

    @parameterized.parameters(*_PRESETS)
    def test_that_is_closed_over(self, preset):
        totals = []
        for transform in (lambda f: f, lambda f: drop(f, preset)):
            total = jax.new_ref(jnp.ones(()))

            def function(w, x, total=total):
                y = checkpoint_name(jnp.tanh(x @ w[0]), "hidden")
                total[...] += lax.stop_gradient(jnp.sum(y))
                return jnp.sum(jnp.sin(y) @ w[1])

            _gradient(transform(function), _W, _X, jit=False)
            totals.append(total[...])
        self.assertNotEqual(totals[0], 1)
        np.testing.assert_allclose(totals[1], totals[0], rtol=1e-6)


if __name__ == "__main__":
    absltest.main()
