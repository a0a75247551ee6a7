"""What is refused: each with its kind of error, and a message that names the offender.

The values of a policy's fields are in `test_policy.py`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized
from flax import nnx

import dropit_jax
from dropit_jax import DropIT, compress
from dropit_jax import linen as dn
from dropit_jax import nnx as dx

_X, _IMAGES = jnp.ones((2, 32)), jnp.ones((2, 5, 5, 16))
_KERNEL, _FILTER = jnp.ones((32, 4)), jnp.ones((3, 3, 16, 4))
_DOT = (((1,), (0,)), ((), ()))
_RANDOM = DropIT(0.5, strategy="random")
_NOISY = DropIT(0.5, value_dtype="int4", rounding="stochastic")


def _dot(kernel, x=_X, **kwargs):
    return dropit_jax.dot_general(x, kernel, _DOT, **kwargs).sum()


def _conv(kernel, x=_IMAGES, **kwargs):
    numbers = ("NHWC", "HWIO", "NHWC")
    return dropit_jax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=numbers, **kwargs
    ).sum()


def _einsum(kernel, x=_X, equation="bd,dh->bh", **kwargs):
    return dropit_jax.einsum(equation, x, kernel, **kwargs).sum()


def _gradient(operation, kernel, **kwargs):
    return jax.grad(lambda kernel: operation(kernel, **kwargs))(kernel)


def _linen_gradient(layer, x):
    variables = layer.init(jax.random.key(0), x)
    return jax.grad(lambda v: layer.apply(v, x).sum())(variables)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(32, name="first")(x)
        return nn.Dense(4, name="second")(x)


def _intercepted(*args, **kwargs):
    with dn.intercept(*args, **kwargs):
        Model().init(jax.random.key(0), _X)


class NnxModel(nnx.Module):
    def __init__(self):
        self.first = nnx.Linear(32, 32, rngs=nnx.Rngs(0))
        self.second = nnx.Linear(32, 4, rngs=nnx.Rngs(0))


_NOT_A_POLICY = (
    ("compress", lambda d: compress(_X, d)),
    ("dot_general", lambda d: _dot(_KERNEL, dropit=d)),
    ("conv_general_dilated", lambda d: _conv(_FILTER, dropit=d)),
    ("einsum", lambda d: _einsum(_KERNEL, dropit=d)),
    ("Dense", lambda d: dn.Dense(4, dropit=d).init(jax.random.key(0), _X)),
    ("Conv", lambda d: dn.Conv(4, (3, 3), dropit=d).init(jax.random.key(0), _IMAGES)),
    (
        "attention",
        lambda d: dn.MultiHeadDotProductAttention(4, dropit=d).init(
            jax.random.key(0), _X
        ),
    ),
    ("intercept", dn.intercept),
    ("Linear", lambda d: dx.Linear(32, 4, dropit=d, rngs=nnx.Rngs(0))),
    (
        "MultiHeadAttention",
        lambda d: dx.MultiHeadAttention(4, 32, dropit=d, rngs=nnx.Rngs(0)),
    ),
    ("apply", lambda d: dx.apply(NnxModel(), d)),
)
_KEYLESS = (
    ("compress", lambda d: compress(_X, d)),
    ("dot_general", lambda d: _gradient(_dot, _KERNEL, dropit=d)),
    ("conv_general_dilated", lambda d: _gradient(_conv, _FILTER, dropit=d)),
    ("einsum", lambda d: _gradient(_einsum, _KERNEL, dropit=d)),
    ("Dense", lambda d: _linen_gradient(dn.Dense(4, dropit=d), _X)),
    (
        "Einsum",
        lambda d: _linen_gradient(dn.Einsum((32, 4), "bd,dh->bh", dropit=d), _X),
    ),
    ("Conv", lambda d: _linen_gradient(dn.Conv(4, (3, 3), dropit=d), _IMAGES)),
    (
        "ConvTranspose",
        lambda d: _linen_gradient(dn.ConvTranspose(4, (3, 3), dropit=d), _IMAGES),
    ),
    (
        "attention",
        lambda d: _linen_gradient(dn.MultiHeadDotProductAttention(4, dropit=d), _X),
    ),
    ("apply", lambda d: dx.apply(NnxModel(), d)),
)
_SHAPES = (
    # (what is done, the error, its message)
    (lambda: compress(jnp.ones((2, 3), int), DropIT()), TypeError, r"int32\(2, 3\)"),
    (
        lambda: _gradient(_dot, _KERNEL, x=jnp.ones((2, 32), int), dropit=DropIT()),
        TypeError,
        r"int32\(2, 32\)",
    ),
    (
        lambda: compress(jnp.ones((2, 3), complex), DropIT()),
        TypeError,
        r"complex64\(2, 3\)",
    ),
    (
        lambda: compress(_X, DropIT(fill="mean")),
        ValueError,
        r"fill='mean'.*\(2, 32\) has 1 element",
    ),
    (
        lambda: _gradient(
            _conv, _FILTER, x=jnp.ones((2, 2, 2, 16)), dropit=DropIT(fill="mean")
        ),
        ValueError,
        r"fill='mean'.*\(2, 2, 2, 16\) has 4 element",
    ),
    (
        lambda: _einsum(_KERNEL, equation="bd,dh", dropit=DropIT()),
        ValueError,
        r"two operands and a result.*'bd,dh'",
    ),
    (
        lambda: _einsum(_KERNEL, equation="b,d,dh->bh", dropit=DropIT()),
        ValueError,
        r"two operands and a result.*'b,d,dh->bh'",
    ),
    (
        lambda: _dot(jnp.ones((16, 4)), dropit=DropIT()),
        TypeError,
        r"contracting dimensions.*\(32,\) and \(16,\)",
    ),
    (
        lambda: _conv(jnp.ones((3, 3, 8, 4)), dropit=DropIT()),
        ValueError,
        r"16.*8",
    ),
    (
        lambda: compress(_X, _RANDOM, key=jnp.ones(3)),
        TypeError,
        r"PRNG key.*\(3,\)",
    ),
)
_PATTERNS = (
    # (arguments of intercept and apply, the error, its message)
    ({"only": "third"}, ValueError, r"'third'.*'second'"),
    ({"only": ["second", "x/*"]}, ValueError, r"matches 'x/\*'; the layers are"),
    ({"exclude": "Dense_*"}, ValueError, r"'Dense_\*'.*'first', 'second'"),
    ({"only": ()}, ValueError, r"only=\(\) matches no layer"),
    ({"only": 3}, TypeError, "only"),
    ({"only": ["second", 3]}, TypeError, r"only.*\['second', 3\]|only.*3"),
    ({"exclude": [None]}, TypeError, r"exclude.*None"),
)


class ErrorsTest(parameterized.TestCase):
    @parameterized.named_parameters(*_NOT_A_POLICY)
    def test_not_a_policy(self, use):
        for value in (0.875, "min_k", DropIT):
            # Where a preset's name is one as well, a string is of the right type.
            expected = (TypeError, ValueError) if value == "min_k" else TypeError
            with pytest.raises(expected, match=r"policy|Unknown preset") as error:
                use(value)
            self.assertIn(repr(value), str(error.value))

    @parameterized.named_parameters(*_KEYLESS)
    def test_a_key_is_missing(self, use):
        for policy in (_RANDOM, _NOISY):
            with pytest.raises(ValueError, match=r"needs.*PRNG key") as error:
                use(policy)
            self.assertIn(repr(policy), str(error.value))

    @parameterized.parameters(*_SHAPES)
    def test_shapes_and_types(self, use, error, message):
        with pytest.raises(error, match=message):
            use()

    @parameterized.parameters(*_PATTERNS)
    def test_patterns(self, arguments, error, message):
        with pytest.raises(error, match=message):
            _intercepted(DropIT(), **arguments)
        model = NnxModel()
        with pytest.raises(error, match=message):
            dx.apply(model, DropIT(), **arguments)
        self.assertIs(type(model.second), nnx.Linear)

    def test_the_first_layer_is_no_match(self):
        with pytest.raises(ValueError, match=r"but the first.*'first'"):
            _intercepted(DropIT(), only="first")
        _intercepted(DropIT(), only="first", skip_first=False)

    def test_flaxs_own_errors_stay(self):
        layer = dn.Dense(4, dropit=DropIT())
        variables = layer.init(jax.random.key(0), _X)
        errors = []
        for each in (layer, nn.Dense(4)):
            with pytest.raises(Exception, match="shape") as error:
                each.apply(variables, jnp.ones((2, 31)))
            errors.append((type(error.value), str(error.value)))
        self.assertEqual(*errors)


if __name__ == "__main__":
    absltest.main()
