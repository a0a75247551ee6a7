import dataclasses
import functools
import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax import lax

from dropit_jax import DropIT, conv_general_dilated, dot_general, memory
from tests.dropit_jax import reference


@dataclasses.dataclass(frozen=True)
class _Scaled:
    """An operation with a parameter, without which two are equal: as Flax modules."""

    scale: float = dataclasses.field(compare=False)

    def __call__(self, *args, **kwargs):
        return self.scale * lax.dot_general(*args, **kwargs)


_NHWC = ("NHWC", "HWIO", "NHWC")

# (shape of lhs, shape of rhs, dimension numbers)
_DOTS = {
    "dense": ((6, 32), (32, 8), (((1,), (0,)), ((), ()))),
    "tokens": ((3, 5, 32), (32, 8), (((2,), (0,)), ((), ()))),
    "vector": ((32,), (32, 8), (((0,), (0,)), ((), ()))),
    "two_axes": ((3, 5, 4, 8), (4, 8, 6), (((2, 3), (0, 1)), ((), ()))),
    "batched": ((3, 5, 32), (3, 32, 8), (((2,), (1,)), ((0,), (0,)))),
    "first_axis": ((32, 6), (32, 8), (((0,), (0,)), ((), ()))),
    "odd": ((3, 5, 21), (21, 4), (((2,), (0,)), ((), ()))),
}
# (shape of lhs, shape of rhs, arguments)
_CONVS = {
    "same": ((2, 8, 8, 32), (3, 3, 32, 8), {"padding": "SAME"}),
    "strided": ((2, 9, 7, 16), (3, 3, 16, 8), {"window_strides": (2, 2)}),
    "dilated": ((2, 9, 9, 16), (3, 3, 16, 8), {"rhs_dilation": (2, 2)}),
    "transposed": (
        (2, 5, 5, 16),
        (3, 3, 16, 8),
        {"lhs_dilation": (2, 2), "padding": ((1, 1), (2, 0))},
    ),
    "grouped": ((2, 8, 8, 32), (3, 3, 8, 16), {"feature_group_count": 4}),
    "padded": ((2, 6, 6, 16), (3, 3, 16, 8), {"padding": ((1, 2), (0, 1))}),
    "odd": ((2, 5, 7, 5), (3, 3, 5, 4), {}),
    "batch_groups": ((4, 6, 6, 16), (3, 3, 16, 8), {"batch_group_count": 2}),
    "one_axis": (
        (2, 12, 16),
        (3, 16, 8),
        {"window_strides": (1,), "dimension_numbers": ("NWC", "WIO", "NWC")},
    ),
    "channels_first": (
        (2, 16, 8, 8),
        (8, 16, 3, 3),
        {"dimension_numbers": ("NCHW", "OIHW", "NCHW")},
    ),
}
# (rate, chunk size): one that lines up with the features, one that does not, a large
# one, none.
_SELECTIONS = ((0.875, 16), (0.5, 10), (0.8, 100), (0.9, None))


def _selected(cases):
    """Every case with one of the selections, in turn."""
    for case, selection in zip(cases, itertools.cycle(_SELECTIONS), strict=False):
        yield case, *selection


@functools.cache
def _dot(case, dropit=None, **kwargs):
    return functools.partial(
        dot_general if dropit else lax.dot_general,
        dimension_numbers=_DOTS[case][2],
        **({"dropit": dropit} if dropit else {}),
        **kwargs,
    )


@functools.cache
def _conv(case, dropit=None, **kwargs):
    defaults = {
        "window_strides": (1, 1),
        "padding": "VALID",
        "dimension_numbers": _NHWC,
    }
    return functools.partial(
        conv_general_dilated if dropit else lax.conv_general_dilated,
        **(defaults | _CONVS[case][2]),
        **({"dropit": dropit} if dropit else {}),
        **kwargs,
    )


def _operands(shapes, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    # Half of it zero and with ties, as after a ReLU.
    activation = np.maximum(np.round(rng.normal(size=shapes[0]), 1), 0)
    kernel = rng.normal(size=shapes[1])
    return jnp.asarray(activation, dtype), jnp.asarray(kernel, dtype)


@functools.cache
def _runner(operation):
    """The operation's output and gradients, for a fixed cotangent.

    Compiled as users' programs are: what is equal to the last bit has to be so there.
    """

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})
    def run(lhs, rhs, cotangent):
        out, pullback = jax.vjp(operation, lhs, rhs)
        return out, *pullback(cotangent)

    def with_cotangent(lhs, rhs):
        out = jax.eval_shape(operation, lhs, rhs)
        cotangent = np.random.default_rng(0).normal(size=out.shape).astype(out.dtype)
        return run(lhs, rhs, cotangent)

    return with_cotangent


def _product_and_gradients(operation, lhs, rhs):
    return _runner(operation)(lhs, rhs)


def _in_order(x, order):
    """The axes in which a sample is cut, and back."""
    return (
        np.transpose(np.asarray(x), order),
        lambda y: jnp.asarray(np.transpose(y, np.argsort(order))),
    )


def _assert_drops_for_the_kernel_alone(
    plain, dropped, lhs, rhs, rate, chunk_size, order
):
    """Output and ∇lhs are the plain operation's, ∇rhs is its at the twin's sparse lhs.

    XLA may sum ∇rhs in another order, for it compiles another program.
    """
    out, grad_lhs, grad_rhs = _product_and_gradients(dropped, lhs, rhs)
    expected_out, expected_grad_lhs, _ = _product_and_gradients(plain, lhs, rhs)
    reference.assert_same_bits(out, expected_out)
    reference.assert_same_bits(grad_lhs, expected_grad_lhs)
    ordered, back = _in_order(lhs, order)
    sparse = back(reference.sparse(ordered, rate, chunk_size))
    expected_grad_rhs = _product_and_gradients(plain, sparse, rhs)[2]
    tolerance = 1e-6 if rhs.dtype == jnp.float32 else 1e-2
    chex.assert_trees_all_close(
        grad_rhs, expected_grad_rhs, rtol=tolerance, atol=tolerance
    )


def _order(case):
    (contracted, _), (batch, _) = _DOTS[case][2]
    rank = len(_DOTS[case][0])
    free = [i for i in range(rank) if i not in (*contracted, *batch)]
    return (*batch, *free, *contracted)


def _conv_order(case):
    return (0, 2, 3, 1) if case == "channels_first" else range(len(_CONVS[case][0]))


class DotGeneralTest(parameterized.TestCase):
    @parameterized.parameters(*_selected(_DOTS))
    def test_gradients(self, case, rate, chunk_size):
        dropped = _dot(case, DropIT(rate, chunk_size=chunk_size))
        lhs, rhs = _operands(_DOTS[case])
        _assert_drops_for_the_kernel_alone(
            _dot(case), dropped, lhs, rhs, rate, chunk_size, _order(case)
        )

    def test_an_axis_that_does_not_exist_is_jaxs_error(self):
        x, kernel = jnp.ones((4, 32)), jnp.ones((32, 8))
        for axis in (-1, 2):
            numbers = (((axis,), (0,)), ((), ()))
            with pytest.raises((TypeError, ValueError)) as plain:
                lax.dot_general(x, kernel, numbers)
            with pytest.raises(type(plain.value)) as ours:
                jax.grad(
                    lambda w, n=numbers: dot_general(x, w, n, dropit=DropIT()).sum()
                )(kernel)
            self.assertEqual(str(ours.value), str(plain.value))

    @parameterized.parameters(("bfloat16", "index"), ("float16", "bitmap"))
    def test_half_precision(self, dtype, encoding):
        dropped = _dot("tokens", DropIT(0.5, encoding=encoding))
        lhs, rhs = _operands(_DOTS["tokens"], dtype)
        _assert_drops_for_the_kernel_alone(
            _dot("tokens"), dropped, lhs, rhs, 0.5, 16, range(3)
        )

    @parameterized.parameters(
        *((chunk_size, "min_k") for chunk_size in (16, 24, 100, None)),
        *((chunk_size, "random") for chunk_size in (24, None)),
    )
    def test_several_axes_of_channels_are_cut_as_one(self, chunk_size, strategy):
        # Whole numbers, whose sums are exact in any order.
        x = jnp.round(8 * reference.finite(0, (2, 5, 3, 32)))
        kernel = jnp.round(8 * reference.finite(1, (3, 32, 7)))
        dropit = DropIT(chunk_size=chunk_size, strategy=strategy)

        def loss(kernel, axes):
            # Of the heads' axes, or of the one that they are merged to.
            shapes = (2, 5, *kernel.shape[:-1]), (*kernel.shape[:-1], 7)
            operands = (a.reshape(s) for a, s in zip((x, kernel), shapes, strict=True))
            contracted = (tuple(2 + a for a in axes), axes), ((), ())
            product = dot_general(
                *operands, contracted, dropit=dropit, key=jax.random.key(3)
            )
            return jnp.sum(product * jnp.arange(7))

        gradient = jax.jit(jax.grad(loss), static_argnums=1)
        apart = gradient(kernel, (0, 1))
        merged = gradient(kernel.reshape(96, 7), (0,))
        np.testing.assert_array_equal(np.reshape(apart, merged.shape), merged)

    def test_options_reach_the_product(self):
        options = {
            "precision": lax.Precision.HIGHEST,
            "preferred_element_type": jnp.float32,
        }
        dropped = _dot("tokens", DropIT(0.5), **options)
        plain = _dot("tokens", **options)
        lhs, rhs = _operands(_DOTS["tokens"], jnp.bfloat16)
        chex.assert_type(dropped(lhs, rhs), jnp.float32)
        _assert_drops_for_the_kernel_alone(plain, dropped, lhs, rhs, 0.5, 16, range(3))

    def test_another_operation_computes_the_product(self):
        def doubled(*args, **kwargs):
            return 2 * lax.dot_general(*args, **kwargs)

        dropped = _dot("dense", DropIT(0.5), operation=doubled)
        plain = functools.partial(doubled, dimension_numbers=_DOTS["dense"][2])
        lhs, rhs = _operands(_DOTS["dense"])
        _assert_drops_for_the_kernel_alone(plain, dropped, lhs, rhs, 0.5, 16, range(2))

    def test_operations_that_are_equal_keep_their_own_gradients(self):
        a, b = np.random.default_rng(0).normal(size=(2, 32, 32)).astype("float32")
        dimensions = ([[1], [0]], [[], []])  # lists, which are not hashable

        def total(lhs, rhs, operations):
            each = (
                dot_general(lhs, rhs, dimensions, dropit=DropIT(), operation=operation)
                for operation in operations
            )
            return sum(result.sum() for result in each)

        gradients = jax.jit(jax.grad(total, argnums=(0, 1)), static_argnums=2)
        expected = gradients(a, b, (lax.dot_general,))
        given = gradients(a, b, (_Scaled(2.0), _Scaled(3.0)))
        chex.assert_trees_all_close(
            given, jax.tree.map(lambda x: 5 * x, expected), rtol=1e-5
        )

    def test_without_a_policy_it_is_the_plain_operation(self):
        lhs, rhs = _operands(_DOTS["dense"])
        numbers = _DOTS["dense"][2]
        ours = jax.make_jaxpr(lambda a, b: dot_general(a, b, numbers))(lhs, rhs)
        plain = jax.make_jaxpr(lambda a, b: lax.dot_general(a, b, numbers))(lhs, rhs)
        self.assertEqual(str(ours), str(plain))


class ConvGeneralDilatedTest(parameterized.TestCase):
    @parameterized.parameters(*_selected(_CONVS))
    def test_gradients(self, case, rate, chunk_size):
        dropped = _conv(case, DropIT(rate, chunk_size=chunk_size))
        lhs, rhs = _operands(_CONVS[case])
        _assert_drops_for_the_kernel_alone(
            _conv(case), dropped, lhs, rhs, rate, chunk_size, _conv_order(case)
        )

    @parameterized.parameters(("bfloat16", "bitmap"), ("float16", "index"))
    def test_half_precision(self, dtype, encoding):
        dropped = _conv("same", DropIT(0.5, encoding=encoding))
        lhs, rhs = _operands(_CONVS["same"], dtype)
        _assert_drops_for_the_kernel_alone(
            _conv("same"), dropped, lhs, rhs, 0.5, 16, range(4)
        )

    def test_layouts_agree(self):
        lhs, rhs = _operands(_CONVS["same"])
        policy = DropIT(0.875)
        last = _product_and_gradients(_conv("same", policy), lhs, rhs)
        first = functools.partial(
            conv_general_dilated,
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NCHW", "OIHW", "NCHW"),
            dropit=policy,
        )

        def transposed(lhs, rhs):
            out = first(lhs.transpose(0, 3, 1, 2), rhs.transpose(3, 2, 0, 1))
            return out.transpose(0, 2, 3, 1)

        chex.assert_trees_all_close(
            _product_and_gradients(transposed, lhs, rhs), last, rtol=1e-5, atol=1e-4
        )

    def test_jax_lax_default_layout(self):
        lhs, rhs = _operands(_CONVS["channels_first"])
        ours = conv_general_dilated(lhs, rhs, (1, 1), "SAME", dropit=DropIT())
        expected = lax.conv_general_dilated(lhs, rhs, (1, 1), "SAME")
        reference.assert_same_bits(ours, expected)


class ResidualTest(parameterized.TestCase):
    @parameterized.parameters("tokens", "odd")
    def test_rate_zero_is_the_plain_operation(self, case):
        lhs, rhs = _operands(_DOTS[case])
        chex.assert_trees_all_equal(
            _product_and_gradients(_dot(case, DropIT(0.0)), lhs, rhs),
            _product_and_gradients(_dot(case), lhs, rhs),
        )

    def test_values_are_stored_in_bfloat16(self):
        lhs, rhs = _operands(_DOTS["tokens"])
        policy = DropIT(0.0, value_dtype="bfloat16")
        actual = _product_and_gradients(_dot("tokens", policy), lhs, rhs)[2]
        rounded = lhs.astype(jnp.bfloat16).astype(jnp.float32)
        expected = _product_and_gradients(_dot("tokens"), rounded, rhs)[2]
        reference.assert_same_bits(actual, expected)

    def test_nan_and_infinity_surface_in_the_gradient(self):
        lhs, rhs = _operands(_DOTS["dense"])
        for bad in (jnp.nan, jnp.inf):
            poisoned = lhs.at[3, 7].set(bad)
            operation = _dot("dense", DropIT())
            gradient = _product_and_gradients(operation, poisoned, rhs)[2]
            self.assertFalse(np.isfinite(gradient[7]).any())
            self.assertTrue(np.isfinite(np.delete(gradient, 7, axis=0)).all())

    def test_a_frozen_kernel_selects_and_caches_nothing(self):
        lhs, rhs = _operands(_CONVS["same"])
        operation = _conv("same", DropIT())

        def loss(lhs, rhs):
            return jnp.sum(operation(lhs, rhs) ** 2)

        def stopped(operands):
            return loss(operands[0], lax.stop_gradient(operands[1]))

        trained = jax.grad(loss, argnums=1)
        self.assertGreater(memory.cached_bytes(trained, lhs, rhs), 0)
        frozen = jax.grad(loss, argnums=0)
        self.assertEqual(memory.cached_bytes(frozen, lhs, rhs), 0)
        frozen = jax.grad(stopped)
        self.assertEqual(memory.cached_bytes(frozen, (lhs, rhs)), 0)
        plain = jax.grad(lambda lhs, rhs: jnp.sum(_conv("same")(lhs, rhs) ** 2))
        expected = jax.jit(plain)(lhs, rhs)
        chex.assert_trees_all_close(
            jax.jit(jax.grad(loss))(lhs, rhs), expected, rtol=1e-6
        )

    def test_evaluation_selects_nothing(self):
        lhs, rhs = _operands(_CONVS["same"])
        opcodes = [
            re.findall(
                r"= \S+ ([a-z-]+)\(", jax.jit(f).lower(lhs, rhs).compile().as_text()
            )
            for f in (_conv("same", DropIT()), _conv("same"))
        ]
        self.assertEqual(*opcodes)

    def test_integers_are_refused(self):
        with pytest.raises(
            TypeError, match="activations of 16 bits or more, got int32"
        ):
            jax.grad(
                lambda kernel: dot_general(
                    jnp.ones((2, 3), int),
                    kernel,
                    (((1,), (0,)), ((), ())),
                    dropit=DropIT(),
                ).sum()
            )(jnp.ones((3, 4)))

    @parameterized.parameters(
        *(None, 3, "ab", ((1,), (0,)), (((1,), (0,)),), ((1, 0), ((), ()))),
        (((1,), (0,)), ((), ()), ()),
    )
    def test_what_is_no_dimension_numbers_is_refused(self, *numbers):
        (numbers,) = numbers if len(numbers) == 1 else (numbers,)
        with pytest.raises(TypeError, match=r"dimension_numbers must be .* got "):
            dot_general(jnp.ones((2, 3)), jnp.ones((3, 4)), numbers, dropit=DropIT())

    def test_forward_mode_is_refused(self):
        lhs, rhs = _operands(_DOTS["dense"])
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jvp(_dot("dense", DropIT()), (lhs, rhs), (lhs, rhs))


if __name__ == "__main__":
    absltest.main()
