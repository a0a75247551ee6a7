"""Gradients of functions some of whose results are not used."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax import lax

from dropit_jax import drop
from dropit_jax.transform.tracing import split
from dropit_jax.transform.tracing.zeros import without_zeros

_X = jnp.linspace(0.1, 1, 8 * 16).reshape(8, 16)


def _pooled(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2), (1, 2), "VALID")


# Backward rules of two results that are not linear in the cotangents `g`.
_RULES = {
    "exponential": lambda r, g: (r * g[0] * jnp.exp(g[1]),),
    "affine": lambda r, g: (g[0] + g[1] + 0.1 * r,),
    "affine_of_one": lambda r, g: (g[1] - r,),
    "chosen": lambda r, g: (jnp.where(r > 0.5, g[1], r),),
    "joined": lambda r, g: (jnp.concatenate([g[1][:4], r[4:]]),),
    "padded": lambda r, g: (lax.pad(g[1][1:], 0.5, [(1, 0, 0), (0, 0, 0)]),),
    "divided": lambda r, g: (r / (1 + g[1]),),
    "pooled": lambda r, g: jax.vjp(_pooled, g[1])[1](r[:, :8]),
    "in_a_barrier": lambda r, g: (sum(lax.optimization_barrier((r, g[1], g[0]))),),
    "jitted": lambda r, g: (jax.jit(lambda a: jnp.cos(a) * r)(g[1]),),
    "scanned": lambda r, g: (
        lax.scan(lambda c, _: (jnp.cos(c) + r, c), g[1], None, length=3)[0],
    ),
    "scanned_from_the_second_step": lambda r, g: (
        lax.scan(lambda c, _: ((c[1], r), c[0]), (g[1], g[1]), None, length=2)[0][0],
    ),
    "conditional": lambda r, g: (
        lax.cond(r[0, 0] > 0, lambda a: a + r, lambda a: 2 * a, g[1]),
    ),
    "looped": lambda r, g: (lax.fori_loop(0, 3, lambda _, c: jnp.cos(c), g[1]),),
}


def _two_results(rule):
    @jax.custom_vjp
    def function(x):
        return 2 * x, 3 * x

    function.defvjp(lambda x: (function(x), x), rule)
    return function


class NonlinearTest(parameterized.TestCase):
    @parameterized.product(name=list(_RULES), preset=["exact", "lean"])
    def test_rules_of_users_see_zeros(self, name, preset):
        function = _two_results(_RULES[name])

        def loss(x):
            return jnp.sum(jnp.sin(function(jnp.tanh(x))[0]))

        for wrapped in (lambda f: f, jax.jit):
            found = wrapped(jax.grad(drop(loss, preset)))(_X)
            tolerance = {"exact": 1e-5, "lean": 0.05}[preset]
            chex.assert_trees_all_close(
                found, jax.grad(loss)(_X), rtol=tolerance, atol=tolerance
            )

    @parameterized.parameters(*_RULES)
    def test_also_where_the_result_is_the_functions(self, name):
        function = drop(_two_results(_RULES[name]), "exact")
        plain = _two_results(_RULES[name])
        found, expected = (
            jax.grad(lambda x, f=f: jnp.sum(f(x)[0] ** 2))(_X)
            for f in (function, plain)
        )
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


class LinearTest(parameterized.TestCase):
    """Checks that nothing is left of the backward pass of JAX's own functions."""

    @parameterized.named_parameters(
        ("elementwise", lambda x: jnp.sin(x) / jnp.exp(x) - x**3),
        ("sums", lambda x: jnp.where(x > 0.5, jnp.pad(x, 1)[1:-1, 1:-1], x.T.T[::-1])),
        ("products", lambda x: jnp.einsum("ij,kj->ik", x, jnp.tanh(x)) @ x),
        ("convolved", lambda x: jnp.convolve(x[0], jnp.sin(x[1]))),
        ("normalised", lambda x: jax.nn.softmax(x - x.mean(-1, keepdims=True))),
        ("gathered", lambda x: x[jnp.array([1, 5, 2])].at[0].add(x[3]).at[1].set(0.0)),
        ("sliced", lambda x: lax.dynamic_update_slice(x, jnp.sin(x[:2, :2]), (1, 1))),
        (
            "joined",
            lambda x: jnp.concatenate([jnp.cumsum(x, 0), jnp.stack([x[0]] * 2)]),
        ),
        (
            "pooled",
            lambda x: lax.reduce_window(x, 0.0, lax.add, (2, 2), (2, 2), "SAME"),
        ),
        ("jitted", lambda x: jax.jit(jnp.var)(x) * x),
        ("checkpointed", jax.checkpoint(lambda x: jnp.sin(jnp.cos(x)))),
        ("scanned", lambda x: lax.scan(lambda c, y: (jnp.sin(c * y), c), x[0], x)),
        ("chosen", lambda x: lax.cond(x[0, 0] > 0, jnp.sin, lambda y: y * 2, x)),
        ("transformed", lambda x: jnp.abs(jnp.fft.fft(x))),
    )
    def test_without_cotangents_nothing_is_left(self, function):
        results = len(jax.tree.leaves(jax.eval_shape(function, _X)))
        halves = split.split(
            lambda x: jax.tree.leaves(function(x)), [jax.typeof(_X)], [True]
        )
        program, gone = without_zeros(halves, [True] * results)
        self.assertEqual(gone, (True,))
        self.assertEmpty(program.nodes)
        self.assertEmpty(program.outputs)

    def test_one_of_two_results(self):
        def function(x):
            return [jnp.sin(x), jnp.exp(jnp.cos(x))]

        halves = split.split(function, [jax.typeof(_X)], [True])
        for unused in ([False, True], [True, False]):
            program, gone = without_zeros(halves, unused)
            self.assertEqual(gone, (False,))
            self.assertLess(len(program.nodes), len(halves.backward.nodes))
            read = {v for node in program.nodes for v in node.operands}
            zero = halves.cotangents[unused.index(True)]
            self.assertNotIn(zero, read)


class DeferredTest(parameterized.TestCase):
    """Equations of the backward pass that read no cotangent."""

    def test_a_constant_that_a_rule_reads_twice(self):
        scale = np.linspace(1, 2, _X.size).astype(np.float32).reshape(_X.shape)

        @jax.custom_vjp
        def double(x):
            return 2 * x

        double.defvjp(
            lambda x: (double(x), x), lambda r, g: (g * scale * jnp.sin(scale),)
        )

        def loss(x):
            return jnp.sum(jnp.sin(double(jnp.tanh(x))))

        chex.assert_trees_all_close(
            jax.grad(drop(loss, "exact"))(_X), jax.grad(loss)(_X), rtol=1e-5
        )

    def test_many_equations_one_after_another(self):
        @jax.custom_vjp
        def double(x):
            return 2 * x

        def backward(r, g):
            for _ in range(1500):
                r = jnp.sin(r)
            return (g * r,)

        double.defvjp(lambda x: (double(x), x), backward)

        def loss(x):
            return jnp.sum(double(jnp.tanh(x)) ** 2)

        x = _X[:2, :2]
        found = jax.jit(jax.grad(drop(loss, "exact")))(x)
        chex.assert_trees_all_close(found, jax.jit(jax.grad(loss))(x), rtol=1e-5)


if __name__ == "__main__":
    absltest.main()
