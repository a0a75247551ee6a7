"""`jax.lax` products, and `einsum`, that store their first operand compressed.

The value and the gradient of the first operand are exact. The gradient of the second
operand, the kernel, is computed from the compressed first one (`rule`).
"""

import reprlib
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import opt_einsum
from jax import lax
from jaxtyping import Array, Float

from dropit_jax.policy import DropIT
from dropit_jax.products.operand import Axes
from dropit_jax.products.rule import Operation, cached_product


def dot_general(
    lhs: Float[Array, "..."],
    rhs: Float[Array, "..."],
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    out_sharding: Any = None,
    dropit: DropIT | None = None,
    key: Array | None = None,
    operation: Callable[..., Array] = lax.dot_general,
) -> Float[Array, "..."]:
    """Returns `lax.dot_general`, and stores `lhs` compressed for the gradient of `rhs`.

    Args:
      lhs: the activation.
      rhs: the kernel.
      dimension_numbers: as in `lax.dot_general`.
      precision: as in `lax.dot_general`.
      preferred_element_type: as in `lax.dot_general`.
      out_sharding: as in `lax.dot_general`.
      dropit: the policy for `lhs`. The first axis that is not contracted is the axis of
        the samples; without one, `lhs` is one sample. The contracted axes together are
        the channels, along which chunks are cut. `None`: the plain operation.
      key: a PRNG key, for policies that need one.
      operation: the function that computes the product, with the signature of
        `lax.dot_general` and linear in each operand.

    Returns:
      The product, bit-identical to the result of `operation`. The gradient of `lhs` is
      exact; the gradient of `rhs` is the one of `operation` at the decompressed `lhs`.

    Raises:
      TypeError: `dropit` is not a policy, or `dimension_numbers` are not two pairs of
        sequences. When differentiated: `lhs` is not a real floating-point array of 16
        bits or more, or JAX takes a forward-mode derivative, or a second derivative
        through `lhs`.
      ValueError: when differentiated, the policy cannot store `lhs`, or the key that
        the policy needs is missing.
    """
    kwargs = {"precision": precision}
    # Few replacements of `lax.dot_general` have these arguments, and few calls do.
    if preferred_element_type is not None:
        kwargs["preferred_element_type"] = preferred_element_type
    if out_sharding is not None:
        kwargs["out_sharding"] = out_sharding

    product = Operation.of(operation, dimension_numbers, **kwargs)
    if dropit is None:
        return product(lhs, rhs)
    contracted = _contracted(dimension_numbers)
    if not all(0 <= axis < jnp.ndim(lhs) for axis in contracted):
        return product(lhs, rhs)  # JAX's error
    others = [i for i in range(jnp.ndim(lhs)) if i not in contracted]
    axes = Axes((*others, *contracted), len(contracted), row_major=True)
    return cached_product(product, lhs, rhs, dropit=dropit, axes=axes, key=key)


def _contracted(dimension_numbers: Any) -> tuple[int, ...]:
    """Returns the contracted axes of the first operand.

    Raises:
      TypeError: the argument is not two pairs of sequences.
    """
    try:
        (contracted, _), (_, _) = dimension_numbers
        return tuple(contracted)
    except (TypeError, ValueError):
        raise TypeError(
            "dimension_numbers must be ((lhs_contracting, rhs_contracting), "
            "(lhs_batch, rhs_batch)), each a sequence of axes, such as "
            f"(((1,), (0,)), ((), ())); got {reprlib.repr(dimension_numbers)}."
        ) from None


def conv_general_dilated(
    lhs: Float[Array, "..."],
    rhs: Float[Array, "..."],
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    *,
    dropit: DropIT | None = None,
    key: Array | None = None,
    operation: Callable[..., Array] = lax.conv_general_dilated,
) -> Float[Array, "..."]:
    """Returns `lax.conv_general_dilated`; stores `lhs` compressed for `rhs`'s gradient.

    Args:
      lhs: the activation.
      rhs: the kernel.
      window_strides: as in `lax.conv_general_dilated`, like all arguments up to
        `out_sharding`.
      dropit: the policy for `lhs`. Chunks of a sample are cut in the order (spatial
        axes, features), in any layout of `lhs`. `None`: the plain operation.
      key: a PRNG key, for policies that need one.
      operation: the function that computes the product, with the signature of
        `lax.conv_general_dilated` and linear in each operand.

    Returns:
      The convolution, bit-identical to the result of `operation`. The gradient of `lhs`
      is exact; the gradient of `rhs` is the one of `operation` at the decompressed
      `lhs`.

    Raises:
      TypeError: `dropit` is not a policy. When differentiated: `lhs` is not a real
        floating-point array of 16 bits or more, or JAX takes a forward-mode derivative,
        or a second derivative through `lhs`.
      ValueError: when differentiated, the policy cannot store `lhs`, or the key that
        the policy needs is missing.
    """
    kwargs: dict[str, Any] = {
        "lhs_dilation": lhs_dilation,
        "rhs_dilation": rhs_dilation,
        "dimension_numbers": dimension_numbers,
        "feature_group_count": feature_group_count,
        "precision": precision,
    }
    if batch_group_count != 1:
        kwargs["batch_group_count"] = batch_group_count
    if preferred_element_type is not None:
        kwargs["preferred_element_type"] = preferred_element_type
    if out_sharding is not None:
        kwargs["out_sharding"] = out_sharding

    product = Operation.of(operation, window_strides, padding, **kwargs)
    if dropit is None:
        return product(lhs, rhs)
    dimensions = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    batch, features, *spatial = dimensions.lhs_spec
    axes = Axes((batch, *spatial, features))
    return cached_product(product, lhs, rhs, dropit=dropit, axes=axes, key=key)


def einsum(
    equation: str,
    lhs: Float[Array, "..."],
    rhs: Float[Array, "..."],
    *,
    dropit: DropIT | None = None,
    key: Array | None = None,
    operation: Callable[..., Array] = jnp.einsum,
    **kwargs: Any,
) -> Float[Array, "..."]:
    """Returns `jax.numpy.einsum`; stores `lhs` compressed for the gradient of `rhs`.

    Args:
      equation: an equation of two operands with an explicit result ("->").
      lhs: the activation.
      rhs: the kernel.
      dropit: the policy for `lhs`. The axes contracted with the kernel are the
        channels, and the first other axis is the axis of the samples. `None`: the plain
        operation.
      key: a PRNG key, for policies that need one.
      operation: the function that computes the product, with the signature of
        `jax.numpy.einsum` and linear in each operand.
      **kwargs: other arguments of `jax.numpy.einsum`.

    Returns:
      The product, bit-identical to the result of `operation`. The gradient of `lhs` is
      exact; the gradient of `rhs` is the one of `operation` at the decompressed `lhs`.

    Raises:
      TypeError: as `dot_general`.
      ValueError: as `dot_general`; or there is a policy, and the equation does not have
        two operands and a result.
    """
    product = Operation.of(operation, first=(equation,), **kwargs)
    if dropit is None:
        return product(lhs, rhs)
    axes = einsum_axes(equation, lhs, rhs)
    return cached_product(product, lhs, rhs, dropit=dropit, axes=axes, key=key)


def einsum_axes(equation: str, lhs: Array, rhs: Array) -> Axes:
    """Returns the axes of `lhs` in an einsum, those contracted with `rhs` last.

    For "dbh,dk->bhk" they are `(1, 2, 0)`, with one channel axis.

    Raises:
      ValueError: the equation does not have two operands and a result.
    """
    equation = equation.replace(" ", "")  # as Flax does, also within the arrow
    if equation.count("->") != 1 or equation.count(",") != 1:
        raise ValueError(
            "DropIT takes einsum equations of two operands and a result, such as "
            f"'bd,dh->bh', got {equation!r}."
        )
    operands, result, _ = opt_einsum.parser.parse_einsum_input((equation, lhs, rhs))
    activation, kernel = operands.split(",")
    channels = [i for i, c in enumerate(activation) if c in kernel and c not in result]
    others = [i for i in range(len(activation)) if i not in channels]
    return Axes((*others, *channels), len(channels), row_major=True)
