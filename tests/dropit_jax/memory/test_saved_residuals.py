import collections
import contextlib
import functools
import io
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized
from jax.ad_checkpoint import checkpoint_name, print_saved_residuals

from dropit_jax import DropIT, memory
from dropit_jax import linen as dn

_X = jax.ShapeDtypeStruct((4, 8), jnp.float32)
_W = jax.ShapeDtypeStruct((8, 8), jnp.float32)
_X_BYTES = 4 * 4 * 8

_only = jax.checkpoint_policies.save_only_these_names


def _cached(residuals):
    """The kinds of what is cached, in order, and how often."""
    kinds = (each.kind for each in residuals.residuals if each.adds_memory)
    return collections.Counter(kinds)


def _network(w, x):
    x = checkpoint_name(jnp.tanh(x @ w), "hidden")
    return jnp.sum(jnp.exp(jnp.sin(x @ w)))


def _sines(w, x):
    return jnp.sum(jnp.exp(jnp.sin(jnp.sin(x @ w) @ w)))


def _loop(w, x):
    return jnp.sum(jax.lax.scan(lambda x, _: (jnp.sin(x @ w), None), x, None, 3)[0])


class MLP(nn.Module):
    dropit: DropIT | None = None

    @nn.compact
    def __call__(self, x):
        for width in (16, 24, 8):
            x = nn.gelu(dn.Dense(width, dropit=self.dropit)(x))
        return dn.Dense(1, name="head", dropit=self.dropit)(x)


def _mlp(dropit=None):
    model = MLP(dropit)
    params = jax.eval_shape(model.init, jax.random.key(0), _X)
    return (lambda params, x: jnp.sum(model.apply(params, x))), params


class SavedResidualsTest(parameterized.TestCase):
    @parameterized.parameters(
        (lambda x: jnp.sum(jnp.sin(x)), {"cos": 1}),
        (lambda x: jnp.sum(jnp.exp(x)), {"exp": 1}),
        (lambda x: jnp.sum(2 * x), {}),
        # The product's other operand is the argument itself.
        (lambda x: jnp.sum(x * jnp.exp(x)), {"exp": 1}),
        # A maximum's mask.
        (lambda x: jnp.sum(nn.relu(x)), {"gt": 1}),
        # A name counts if any of the uses is of what it names.
        (lambda x: jnp.sum(x * checkpoint_name(jnp.exp(x), "e")), {"e": 1}),
    )
    def test_kinds(self, fn, expected):
        for wrap in (lambda fn: fn, jax.jit):
            residuals = memory.saved_residuals(wrap(fn), _X)
            self.assertEqual(_cached(residuals), expected)

    @parameterized.parameters(
        (_sines, _W),
        (jax.jit(_sines), _W),
        (jax.checkpoint(_sines), _W),
        (jax.checkpoint(_network, policy=_only("hidden")), _W),
        (_loop, _W),
        _mlp(),
    )
    def test_agrees_with_jax(self, fn, params):
        args = (params, _X)
        found = collections.Counter(
            (each.kind == "argument", f"{each.dtype}{list(each.shape)}")
            for each in memory.saved_residuals(fn, *args).residuals
        )
        self.assertEqual(found, _jaxs_residuals(fn, *args))

    def test_agrees_with_what_is_really_cached(self):
        loss, params = _mlp()
        loss = jax.jit(loss)  # operation by operation, arguments are copied
        params, x = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), (params, _X))
        leaves = jax.tree.leaves(jax.vjp(loss, params, x)[1])
        given = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((params, x))}
        cached = {
            leaf.unsafe_buffer_pointer(): leaf.nbytes
            for leaf in leaves
            if leaf.shape and leaf.unsafe_buffer_pointer() not in given
        }
        found = memory.saved_residuals(loss, params, x)
        self.assertEqual(found.total_bytes, sum(cached.values()))

    def test_totals(self):
        residuals = memory.saved_residuals(_network, _W, _X)
        self.assertEqual(residuals.total_bytes, sum(residuals.by_kind.values()))
        sizes = [each.nbytes for each in residuals.residuals]
        self.assertEqual(sizes, sorted(sizes, reverse=True))
        self.assertEqual(residuals.by_kind["hidden"], _X_BYTES)

    def test_one_array_is_listed_once(self):
        def fn(x):
            y = jnp.exp(x)
            return jnp.sum(y * jnp.sin(y.reshape(-1)).reshape(y.shape))

        # exp(x) for both products and its own derivative, and sin and cos of it.
        expected = {"exp": _X_BYTES, "sin": _X_BYTES, "cos": _X_BYTES}
        self.assertEqual(memory.saved_residuals(fn, _X).by_kind, expected)

    def test_two_calls_of_a_function_cache_two_arrays(self):
        sine = jax.jit(jnp.sin)
        residuals = memory.saved_residuals(lambda x: jnp.sum(sine(sine(x))), _X)
        self.assertEqual(residuals.by_kind, {"cos": 2 * _X_BYTES})

    def test_what_the_backward_pass_does_not_read_is_left_out(self):
        @jax.custom_vjp
        def fn(x):
            return x

        fn.defvjp(
            lambda x: (x, (jnp.sin(x), jnp.cos(x))), lambda saved, g: (g * saved[0],)
        )
        residuals = memory.saved_residuals(lambda x: jnp.sum(fn(jnp.exp(x))), _X)
        self.assertEqual(_cached(residuals), {"sin": 1, "exp": 1})

    def test_arguments_do_not_count(self):
        x, y = memory.saved_residuals(lambda x, y: jnp.sum(x * y), _X, _X).residuals
        self.assertEqual((x.kind, y.kind), ("argument", "argument"))
        residuals = memory.saved_residuals(lambda w, x: (x @ w).sum(), _W, _X)
        self.assertEqual((residuals.total_bytes, residuals.by_kind), (0, {}))

    def test_integers_keys_and_trees(self):
        def fn(tree, index, key):
            picked = jnp.exp(tree["x"])[index]
            return {"y": picked * jax.random.normal(key, picked.shape), "i": index}

        index = jax.ShapeDtypeStruct((3,), jnp.int32)
        key = jax.eval_shape(lambda: jax.random.key(0))
        residuals = memory.saved_residuals(fn, {"x": _X}, index, key)
        self.assertEqual(residuals.by_kind["exp"], _X_BYTES)
        self.assertEqual(
            {(each.shape, each.dtype) for each in residuals.residuals},
            {((4, 8), "float32"), ((3, 8), "float32"), ((3, 1), "int32")},
        )
        self.assertEqual(memory.saved_residuals(lambda i: i + 1, index).residuals, ())

    def test_loops_cache_each_step(self):
        by_kind = memory.saved_residuals(_loop, _W, _X).by_kind
        # The product's operand, which is the sine of the step before, and the cosine.
        self.assertEqual(by_kind, {"sin": 3 * _X_BYTES, "cos": 3 * _X_BYTES})

    @parameterized.named_parameters(
        ("also_stacked", lambda c, x: (jnp.sin(c * x),) * 2),
        ("of_the_inputs", lambda c, x: (x, c * jnp.sin(x))),
        ("swapped", lambda c, x: (jnp.cos(x) + c, jnp.cos(x) * c)),
    )
    def test_the_last_carry_is_an_array_of_its_own(self, step):
        def fn(carry, xs):
            last, stacked = jax.lax.scan(step, carry, xs)
            return jnp.sum(last**2) + jnp.sum(stacked**2)

        carry, xs = jnp.arange(1.0, 5.0), jnp.linspace(0.5, 1, 20).reshape(5, 4)
        _, pullback = jax.vjp(fn, carry, xs)
        arrays = [x for x in jax.tree.leaves(pullback) if x is not xs]
        found = memory.saved_residuals(fn, carry, xs)
        self.assertEqual(found.total_bytes, sum(x.nbytes for x in arrays))

    def test_loops_that_hand_their_inputs_on(self):
        def fn(w, x):
            def step(carry, _):
                one, other, x = carry
                one = checkpoint_name(one, "one")
                return (other, one.reshape(8, 8), jnp.sin(x @ one)), None

            carry = (w, 2 * w, x)
            return jnp.sum(jax.lax.scan(step, carry, None, 4)[0][2])

        by_kind = memory.saved_residuals(fn, _W, _X).by_kind
        self.assertEqual(by_kind["one"], 4 * 4 * 8 * 8)
        self.assertEqual(by_kind["cos"], 4 * _X_BYTES)


class LayersTest(parameterized.TestCase):
    def test_residuals_tell_their_layer(self):
        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = nn.LayerNorm(name="norm")(x)
                return jnp.sin(nn.Dense(8, name="dense")(x))

        params = jax.eval_shape(Net().init, jax.random.key(0), _X)
        for wrap in (lambda fn: fn, jax.jit):
            fn = wrap(lambda params, x: jnp.sum(jnp.exp(Net().apply(params, x))))
            residuals = memory.saved_residuals(fn, params, _X).residuals
            layers = {each.kind: each.layer for each in residuals}
            self.assertEqual(layers["rsqrt"], "norm")
            self.assertEqual(layers["cos"], "Net")
            self.assertEqual(layers["exp"], "")

    @parameterized.product(
        policy=[DropIT(0.5), DropIT(0.75, chunk_size=None), DropIT(value_dtype="int4")],
        wrap=[
            lambda fn: fn,
            jax.jit,
            functools.partial(jax.checkpoint, policy=_only("dropit")),
        ],
    )
    def test_what_dropit_caches(self, policy, wrap):
        loss, params = _mlp(policy)
        loss = wrap(loss)
        found = memory.saved_residuals(loss, params, _X)
        expected = memory.cached_bytes(jax.grad(loss, (0, 1)), params, _X)
        self.assertEqual(found.by_kind["dropit"], expected)
        self.assertEqual(
            {each.layer for each in found.residuals if each.kind == "dropit"},
            {"Dense_0", "Dense_1", "Dense_2", "head"},
        )

    def test_dropit_in_a_loop(self):
        dense = dn.Dense(8, dropit=DropIT(0.5))
        params = jax.eval_shape(dense.init, jax.random.key(0), _X)

        def loss(params, x):
            def step(x, _):
                return jnp.sin(dense.apply(params, x)), None

            return jnp.sum(jax.lax.scan(step, x, None, 3)[0])

        found = memory.saved_residuals(loss, params, _X)
        expected = memory.cached_bytes(jax.grad(loss, (0, 1)), params, _X)
        self.assertEqual(found.by_kind["dropit"], expected)
        self.assertEqual(found.by_kind["cos"], 3 * _X_BYTES)


class TableTest(parameterized.TestCase):
    def test_shows_all(self):
        def fn(w, x):
            with jax.named_scope("model"):
                return jnp.sum(checkpoint_name(jnp.exp(x @ w), "kept"))

        table = str(memory.saved_residuals(fn, _W, _X))
        self.assertEqual(
            table,
            """\
bytes  type          kind        layer
--------------------------------------
  256  float32[8,8]  (argument)
  128  float32[4,8]  (argument)
  128  float32[4,8]  exp         model
--------------------------------------
  128                exp
--------------------------------------
  128                total""",
        )


def _jaxs_residuals(fn, *args):
    """Returns JAX's own list: for each residual whether an argument, and its type."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        print_saved_residuals(fn, *args)
    return collections.Counter(
        (
            "from the argument" in line,
            f"float32[{', '.join(re.findall(r'[0-9]+', line.split(']')[0])[1:])}]",
        )
        for line in printed.getvalue().splitlines()
        if "from a literal" not in line
    )


if __name__ == "__main__":
    absltest.main()
