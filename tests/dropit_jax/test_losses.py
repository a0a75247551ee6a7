import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from absl.testing import absltest, parameterized
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

import dropit_jax
from tests.dropit_jax import pullbacks, reference

_HARD = (
    dropit_jax.nn.softmax_cross_entropy_with_integer_labels,
    optax.softmax_cross_entropy_with_integer_labels,
)
_SOFT = dropit_jax.nn.softmax_cross_entropy, optax.softmax_cross_entropy
_BOTH = {"hard": _HARD, "soft": _SOFT}

_INF = np.inf


def _logits(shape, dtype="float32", scale=1.0):
    x = np.random.default_rng(0).normal(size=shape) * scale
    return jnp.asarray(x, dtype)


def _labels(shape):
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.integers(0, shape[-1], shape[:-1]), jnp.int32)


def _probabilities(shape, dtype="float32"):
    x = 1.5 * np.random.default_rng(2).random(shape) / shape[-1]
    return jnp.asarray(x, dtype)


def _arguments(kind, shape, dtype="float32", scale=1.0):
    labels = _labels(shape) if kind == "hard" else _probabilities(shape, dtype)
    return _logits(shape, dtype, scale), labels


def _float64(tree):
    floats = (x for x in jax.tree.leaves(tree) if x.dtype != jax.dtypes.float0)
    return [np.asarray(x, np.float64) for x in floats]


class LossesTest(parameterized.TestCase):
    @parameterized.product(
        kind=tuple(_BOTH), case=(((5,), 1.0), ((4, 7), 30.0), ((2, 3, 10), 1.0))
    )
    def test_float32_is_optaxs(self, kind, case):
        shape, scale = case
        ours, theirs = _BOTH[kind]
        args = _arguments(kind, shape, scale=scale)
        value, gradients = pullbacks.value_and_gradients(ours, *args)
        expected, expected_gradients = pullbacks.value_and_gradients(theirs, *args)
        reference.assert_same_bits(value, expected)
        chex.assert_trees_all_equal_shapes_and_dtypes(gradients, expected_gradients)
        for a, b in zip(*map(_float64, (gradients, expected_gradients)), strict=True):
            np.testing.assert_allclose(a, b, rtol=4e-7, atol=1e-8)

    @parameterized.product(
        kind=tuple(_BOTH), dtype=("bfloat16", "float16"), scale=(1.0, 30.0)
    )
    def test_half_precision_is_rounded_once(self, kind, dtype, scale):
        ours, theirs = _BOTH[kind]
        args = _arguments(kind, (4, 100), dtype, scale)
        value, gradients = pullbacks.value_and_gradients(ours, *args)
        expected, like = pullbacks.value_and_gradients(theirs, *args)
        chex.assert_trees_all_equal_shapes_and_dtypes(
            (value, gradients), (expected, like)
        )
        reference.assert_same_bits(jax.jit(ours)(*args), jax.jit(theirs)(*args))

        def wide(*args):
            return theirs(*args).astype(dtype)  # so that the cotangents are the same

        widened = jax.tree.map(
            lambda x: (
                x.astype(jnp.float32) if jnp.isdtype(x.dtype, "real floating") else x
            ),
            args,
        )
        _, exact = pullbacks.value_and_gradients(wide, *widened)
        rounding = float(jnp.finfo(dtype).eps)
        for a, b in zip(*map(_float64, (gradients, exact)), strict=True):
            np.testing.assert_allclose(a, b, rtol=rounding, atol=1e-6)

    def test_large_logits_are_as_exact(self):
        for kind, (ours, theirs) in _BOTH.items():
            logits, labels = _arguments(kind, (4, 8))
            shifted = jnp.round(logits, 1) + 8192.0
            actual, expected = (
                jax.jit(jax.grad(lambda x, f=f, y=labels: f(x, y).sum()))(shifted)
                for f in (ours, theirs)
            )
            np.testing.assert_allclose(actual, expected, rtol=4e-7, atol=1e-8)

    @parameterized.parameters("int8", "uint8", "int32")
    def test_labels_of_any_integer_type(self, dtype):
        labels = jnp.asarray([0, 1, 127, 100], dtype)
        self._assert_is_optaxs(_HARD, _logits((4, 300)), labels)

    def test_labels_from_the_end_and_of_no_class(self):
        labels = jnp.asarray([0, -1, -7, 6, 7, -8])
        value = self._assert_is_optaxs(_HARD, _logits((6, 7)), labels)
        self.assertEqual(np.isnan(value).tolist(), [False] * 4 + [True] * 2)

    @parameterized.parameters("hard", "soft")
    def test_nan_and_infinities(self, kind):
        rows = [[1, 2, -_INF], [_INF, 1, 2], [-_INF] * 3, [np.nan, 1, 2]]
        rows += [[_INF, _INF, 1], [_INF, -_INF, 1]]
        logits = jnp.asarray(rows, jnp.float32)
        if kind == "soft":
            labels = jnp.asarray([[0.25, 0.75, 0]] * 6)
            self._assert_is_optaxs(_SOFT, logits, labels)
            return
        for label in range(3):
            self._assert_is_optaxs(_HARD, logits, jnp.full(6, label))

    def _assert_is_optaxs(self, pair, logits, labels):
        ours, theirs = (
            pullbacks.value_and_gradients(fn, logits, labels) for fn in pair
        )
        for a, b in zip(_float64(ours), _float64(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=4e-7, atol=1e-7)
        return ours[0]

    @hypothesis.given(
        seed=st.integers(0, 2**31), scale=st.sampled_from([1e-3, 1.0, 50.0, 1e4])
    )
    def test_gradients_of_many_rows(self, seed, scale):
        rng = np.random.default_rng(seed)
        logits = jnp.asarray(rng.normal(size=(3, 6)) * scale, jnp.float32)
        labels = jnp.asarray(rng.integers(0, 6, 3))
        soft = jnp.asarray(rng.random((3, 6)), jnp.float32)
        for (ours, theirs), args in zip(
            _GRADIENTS, ((logits, labels), (logits, soft)), strict=True
        ):
            for a, b in zip(ours(*args), theirs(*args), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)

    @parameterized.parameters(
        ("float32", "int32", "float32"),
        ("bfloat16", "bool", "bfloat16"),
        ("bfloat16", "float32", "float32"),
        ("float32", "bfloat16", "float32"),
    )
    def test_labels_of_another_type(self, dtype, labels_dtype, expected):
        labels = jax.nn.one_hot(_labels((4, 7)), 7, dtype=labels_dtype)
        ours, theirs = (
            pullbacks.value_and_gradients(fn, _logits((4, 7), dtype), labels)
            for fn in _SOFT
        )
        self.assertEqual(ours[0].dtype, expected)
        chex.assert_trees_all_equal_shapes_and_dtypes(ours, theirs)
        rounding = 0.02 if "bfloat16" in (dtype, labels_dtype) else 1e-6
        for a, b in zip(_float64(ours), _float64(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=rounding, atol=rounding)

    @parameterized.parameters(
        ((4, 7), (7,)), ((4, 7), (4, 1)), ((7,), (4, 7)), ((4, 7), ())
    )
    def test_labels_that_broadcast(self, shape, labels_shape):
        labels = jnp.asarray(np.random.default_rng(2).random(labels_shape), jnp.float32)
        self._assert_is_optaxs(_SOFT, _logits(shape), labels)

    @parameterized.parameters("hard", "soft")
    def test_caches_the_arguments_and_two_numbers_a_row(self, kind):
        logits, labels = _arguments(kind, (2, 3, 16), "bfloat16")
        _, pullback = jax.vjp(lambda x: _BOTH[kind][0](x, labels), logits)
        leaves = jax.tree.leaves(pullback)
        rows = [leaf for leaf in leaves if leaf.shape == (2, 3) and leaf is not labels]
        self.assertEqual([leaf.dtype for leaf in rows], [jnp.float32] * 2)
        self.assertLen(leaves, 4)
        self.assertEqual(
            sum(leaf.nbytes for leaf in leaves), logits.nbytes + labels.nbytes + 6 * 8
        )

    @parameterized.parameters(
        (0, jnp.ones((3, 4), int), jnp.ones(3, int), TypeError, "floating.*int32"),
        (0, jnp.ones((3, 4)), jnp.ones(3), TypeError, "integers, got float32"),
        (0, jnp.ones((3, 4)), jnp.ones(4, int), ValueError, r"\(4,\).*\(3, 4\)"),
        (0, jnp.ones(()), jnp.ones((), int), ValueError, "axis of classes"),
        (1, jnp.ones((3, 4), int), jnp.ones((3, 4)), TypeError, "floating.*int32"),
        (1, jnp.ones((3, 4)), jnp.ones((3, 5)), ValueError, "shape"),
        (1, jnp.ones((3, 1)), jnp.ones((3, 5)), ValueError, r"\(3, 5\).*\(3, 1\)"),
    )
    def test_what_is_refused(self, which, logits, labels, error, message):
        jaxtyping.config.update("jaxtyping_disable", True)  # they are checked first
        self.addCleanup(jaxtyping.config.update, "jaxtyping_disable", False)
        with pytest.raises(error, match=message):
            (_HARD, _SOFT)[which][0](logits, labels)


_GRADIENTS = tuple(
    tuple(
        jax.jit(jax.grad(lambda x, y, f=f: f(x, y).sum(), argnums)) for f in functions
    )
    for functions, argnums in ((_HARD, (0,)), (_SOFT, (0, 1)))
)


class TransformationsTest(parameterized.TestCase):
    @parameterized.parameters("hard", "soft")
    def test_gradients_are_those_of_optax(self, kind):
        logits, labels = _arguments(kind, (4, 3, 8))

        def loss(fn, x, labels):
            return jnp.sum(fn(x, labels) ** 2)

        ours, theirs = (functools.partial(loss, fn) for fn in _BOTH[kind])

        def scanned(logits):
            def body(total, args):
                return total + ours(*args), None

            return jax.lax.scan(body, 0.0, (logits, labels))[0]

        @jax.jit
        def gradients(logits):
            return (
                jax.vmap(jax.grad(theirs))(logits, labels),
                jax.vmap(jax.grad(ours))(logits, labels),
                jax.grad(jax.checkpoint(ours))(logits, labels),
                jax.lax.map(lambda args: jax.grad(ours)(*args), (logits, labels)),
                jax.grad(scanned)(logits),
            )

        expected, *actual = gradients(logits)
        for gradient in actual:
            chex.assert_trees_all_close(gradient, expected, rtol=1e-5, atol=1e-6)

    @parameterized.parameters("hard", "soft")
    def test_second_derivatives_are_optaxs(self, kind):
        logits, labels = _arguments(kind, (6,))
        ours, theirs = (lambda x, f=f: f(x, labels) ** 2 for f in _BOTH[kind])
        close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)
        expected = jax.jit(jax.hessian(theirs))(logits)
        close(jax.jit(jax.hessian(ours))(logits), expected)
        close(jax.jit(jax.jacrev(jax.grad(ours)))(logits), expected)

    @parameterized.parameters("hard", "soft")
    def test_a_policy_can_save_the_two_numbers_and_nothing_else(self, kind):
        logits, labels = _arguments(kind, (4, 16))
        fn = _BOTH[kind][0]
        policy = jax.checkpoint_policies.save_only_these_names(fn.__name__)
        loss = jax.checkpoint(lambda x: fn(x, labels), policy=policy)
        _, pullback = jax.vjp(loss, logits)
        self.assertEqual(
            sum(leaf.nbytes for leaf in jax.tree.leaves(pullback)),
            logits.nbytes + labels.nbytes + 4 * 8,
        )

    @parameterized.product(
        kind=tuple(_BOTH),
        axis_type=(AxisType.Auto, AxisType.Explicit),
        classes=(None, "model"),
    )
    def test_on_a_mesh_rows_alone_move(self, kind, axis_type, classes):
        axes = ("data", "model")
        mesh = jax.make_mesh((4, 2), axes, axis_types=(axis_type,) * 2)
        logits, labels = _arguments(kind, (8, 5, 32))
        spec = PartitionSpec("data", None, classes)

        def gradient(logits, labels):
            return jax.grad(lambda x: jnp.sum(_BOTH[kind][0](x, labels)))(logits)

        expected = jax.device_get(jax.jit(gradient)(logits, labels))
        with jax.set_mesh(mesh):
            sharded = jax.device_put(logits, spec)
            labels_spec = spec if kind == "soft" else PartitionSpec("data", None)
            labels = jax.device_put(labels, labels_spec)
            compiled = jax.jit(gradient).lower(sharded, labels).compile()
            # Shared-out classes are added up in pieces: sums of rows, no classes.
            moves = "all-g|all-t|collective|reduce-scatter|all-reduce.*,16]"
            if classes is None:
                moves += "|all-reduce"
            self.assertNotRegex(compiled.as_text(), moves)
            actual = jax.device_get(compiled(sharded, labels))
        chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    absltest.main()
