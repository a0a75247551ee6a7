"""Activation functions whose residuals take one bit or one byte an element.

The `jax.nn` function of the same name computes the value. The residual is a code of the
derivative: one bit an element if the derivative is one of two numbers, with an exact
gradient; else one byte, with a bounded error. Autodiff of the `jax.nn` functions stores
one or several arrays in the activation's own type instead.

No function has a forward-mode derivative, and those that store a byte have no second
derivative: JAX or this library raises a `TypeError`. The residual's `checkpoint_name`
is the name of the function.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

from dropit_jax import derivatives
from dropit_jax.storage import dtypes, element_codes
from dropit_jax.storage.element_codes import ElementCodes

_Activation = Callable[[Array], Array]


def relu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns the rectified linear unit, `max(x, 0)`; stores one bit an element.

    With `jax.nn.relu` XLA recomputes `x > 0` in the backward pass from a dense array,
    which stays in memory. The gradient is bit-identical to that of `jax.nn.relu`, also
    at 0 (where it is 0) and at NaN.

    Args:
      x: an array of any real floating dtype.
    """
    return _two_sided(_RELU, "relu", x)


def relu6(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns `min(max(x, 0), 6)`; stores one bit an element.

    The gradient is bit-identical to that of `jax.nn.relu6`, also at 0 and 6 (where it
    is 0) and at NaN.

    Args:
      x: an array of any real floating dtype.
    """
    return _two_sided(_RELU6, "relu6", x)


def leaky_relu(
    x: Float[Array, "*shape"], negative_slope: float = 0.01
) -> Float[Array, "*shape"]:
    """Returns `x` where `x >= 0`, else `negative_slope * x`; stores one bit an element.

    The gradient is bit-identical to that of `jax.nn.leaky_relu`, also at 0 (where it is
    1) and at NaN.

    Args:
      x: an array of any real floating dtype.
      negative_slope: a Python number, which has no gradient.

    Raises:
      TypeError: the slope is not an `int` or `float`, but an array or a NumPy number,
        for example.
    """
    # A NumPy number would decide the dtype of the result.
    if type(negative_slope) not in (int, float):
        raise TypeError(
            "dropit_jax.nn.leaky_relu takes a number as negative_slope, got "
            f"{negative_slope!r}; a slope that is learned needs jax.nn.leaky_relu."
        )
    return _two_sided(_leaky_relu(float(negative_slope)), "leaky_relu", x)


def gelu(x: Float[Array, "*shape"], approximate: bool = True) -> Float[Array, "*shape"]:
    """Returns the Gaussian error linear unit, `x Φ(x)`; stores one byte an element.

    The derivative has an error of 1/400 at most, before it is rounded to the type of
    `x`, and is exact where it is 0 or 1.

    Args:
      x: an array of a real floating dtype of 16 bits or more.
      approximate: whether to approximate Φ by tanh, as in `jax.nn.gelu`.

    Raises:
      TypeError: JAX takes a forward-mode or a second derivative.
    """
    return _smooth(_gelu(bool(approximate)), _Scale(zero=27, steps=200), "gelu", x)


def silu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns the sigmoid linear unit, `x · sigmoid(x)`; stores one byte an element.

    The derivative has an error of 1/400 at most, before it is rounded to the type of
    `x`, and is exact where it is 0 or 1.

    Args:
      x: an array of a real floating dtype of 16 bits or more.

    Raises:
      TypeError: JAX takes a forward-mode or a second derivative.
    """
    return _smooth(jax.nn.silu, _Scale(zero=27, steps=200), "silu", x)


swish = silu


def tanh(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns the hyperbolic tangent; stores one byte an element.

    The derivative has an error of 1/508 at most, before it is rounded to the type of
    `x`, and is exact where it is 0 or 1.

    Args:
      x: an array of a real floating dtype of 16 bits or more.

    Raises:
      TypeError: JAX takes a forward-mode or a second derivative.
    """
    return _smooth(jnp.tanh, _Scale(zero=0, steps=254), "tanh", x)


def sigmoid(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns the logistic function, `1 / (1 + exp(-x))`; stores one byte an element.

    The derivative has an error of 1/2032 at most, before it is rounded to the type of
    `x`, and is exact where it is 0 or 1/4.

    Args:
      x: an array of a real floating dtype of 16 bits or more.

    Raises:
      TypeError: JAX takes a forward-mode or a second derivative.
    """
    return _smooth(jax.nn.sigmoid, _Scale(zero=0, steps=1016), "sigmoid", x)


@dataclasses.dataclass(frozen=True)
class _Sides:
    """A function with one derivative inside a range and another one outside.

    The derivative inside is the one at 1, the derivative outside the one at -1.

    Attributes:
      function: the function.
      inside: returns a bit mask of the elements inside the range.
      of_value: whether `inside` gives the same mask for the function's value as for its
        argument. The value is in memory anyway.
      zero_outside: whether the gradient is the cotangent inside and 0 outside, even for
        an infinite or NaN cotangent.
    """

    function: _Activation
    inside: Callable[[Array], Array]
    of_value: bool
    zero_outside: bool = False


def _is_positive(x: Array) -> Array:
    return x > 0


def _is_not_negative(x: Array) -> Array:
    return x >= 0


def _is_between_0_and_6(x: Array) -> Array:
    return (x > 0) & (x < 6)


_RELU = _Sides(jax.nn.relu, _is_positive, of_value=True, zero_outside=True)
_RELU6 = _Sides(jax.nn.relu6, _is_between_0_and_6, of_value=True)


# Cached, because JAX compares functions by identity when it looks for a trace.
@functools.cache
def _leaky_relu(slope: float) -> _Sides:
    function = functools.partial(jax.nn.leaky_relu, negative_slope=slope)
    return _Sides(function, _is_not_negative, of_value=False)


@functools.cache
def _gelu(approximate: bool) -> _Activation:
    return functools.partial(jax.nn.gelu, approximate=approximate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _two_sided(sides: _Sides, name: str, x: Array) -> Array:
    """Returns `sides.function(x)`; its derivative rule stores one bit an element."""
    del name
    return sides.function(x)


def _two_sided_forward(
    sides: _Sides, name: str, x: Array
) -> tuple[Array, ElementCodes]:
    if sides.of_value:
        return element_codes.store(sides.function(x), sides.inside, bits=1, name=name)
    x, saved = element_codes.store(x, sides.inside, bits=1, name=name)
    return sides.function(x), saved


def _two_sided_backward(
    sides: _Sides, name: str, saved: ElementCodes, cotangent: Array
) -> tuple[Array]:
    del name
    gradient = _zero_outside if sides.zero_outside else _gradient_of(sides.function)
    return (element_codes.apply(saved, cotangent, gradient),)


def _zero_outside(inside: Array, cotangent: Array) -> Array:
    return lax.select(inside.astype(bool), cotangent, lax.full_like(cotangent, 0))


# Cached, because JAX compares functions by identity when it looks for a trace.
@functools.cache
def _gradient_of(function: _Activation) -> Callable[[Array, Array], Array]:
    """Returns a function from (mask of elements inside, cotangent) to the gradient."""

    def gradient(inside: Array, cotangent: Array) -> Array:
        there, beyond = (lax.full_like(cotangent, sign) for sign in (1, -1))
        alike = lax.select(inside.astype(bool), there, beyond)
        _, pullback = jax.vjp(function, alike)
        return pullback(cotangent)[0]

    return gradient


_two_sided.defvjp(_two_sided_forward, _two_sided_backward)


# The bits of a NaN in float32.
_NAN = 0x7FC00000


@dataclasses.dataclass(frozen=True)
class _Scale:
    """Codes derivatives as bytes: `code = round(steps · derivative) + zero`.

    Codes are clipped to [0, 254]; 255 is the code of NaN. With `zero=27, steps=200` the
    derivatives -0.1, 0, 1 have the codes 7, 27, 227.

    Attributes:
      zero: the code of the derivative 0.
      steps: the difference between the codes of 1 and of 0.
    """

    zero: int
    steps: int

    def encode(self, derivative: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
        """Returns the nearest codes."""
        code = lax.round(derivative * self.steps, lax.RoundingMethod.TO_NEAREST_EVEN)
        least, most = (lax.full_like(code, number) for number in (0, 254))
        code = lax.clamp(least, code + self.zero, most)
        of_nan = lax.full_like(code, 255)
        return lax.select(jnp.isnan(derivative), of_nan, code).astype(jnp.uint8)

    def decode(self, code: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Returns the derivatives of codes, in float32."""
        derivative = (code.astype(jnp.float32) - self.zero) / self.steps
        # NaN as bits: with `jax_debug_nans` a NaN constant would raise an error.
        bits = lax.bitcast_convert_type(derivative, jnp.uint32)
        of_nan = lax.full_like(bits, _NAN)
        return lax.bitcast_convert_type(
            lax.select(code == 255, of_nan, bits), jnp.float32
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _smooth(function: _Activation, scale: _Scale, name: str, x: Array) -> Array:
    """Returns `function(x)`; its derivative rule stores one byte an element."""
    del scale, name
    return function(x)


def _smooth_forward(
    function: _Activation, scale: _Scale, name: str, x: Array
) -> tuple[Array, ElementCodes]:
    x = derivatives.differentiable_once(x, "An activation")
    value, code = _value_and_code(x, function, scale)
    return element_codes.store_apart(value, code, bits=8, name=name)


# Jitted, so that all activations of one shape share one trace.
@functools.partial(jax.jit, static_argnames=("function", "scale"), inline=True)
def _value_and_code(
    x: Float[Array, "*shape"], function: _Activation, scale: _Scale
) -> tuple[Float[Array, "*shape"], UInt8[Array, "*shape"]]:
    """Returns the function's value and the codes of its derivative at each element."""
    wide = x.astype(dtypes.wide(x.dtype))
    value, pullback = jax.vjp(function, wide)
    code = scale.encode(*pullback(jnp.ones_like(wide)))
    return value if wide.dtype == x.dtype else function(x), code


def _smooth_backward(
    function: _Activation,
    scale: _Scale,
    name: str,
    saved: ElementCodes,
    cotangent: Array,
) -> tuple[Array]:
    del function, name
    code = element_codes.load(saved, cotangent)
    derivative = scale.decode(code)
    wide = cotangent.astype(dtypes.common(cotangent.dtype, derivative.dtype))
    return ((wide * derivative.astype(wide.dtype)).astype(cotangent.dtype),)


_smooth.defvjp(_smooth_forward, _smooth_backward)
