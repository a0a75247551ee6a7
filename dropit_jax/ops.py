"""`jax.lax` products that cache a compressed first operand for the weight gradient.

All operations share one rule. For a product `z = op(a, θ)`, linear in each operand:

    forward    z = op(a, θ)                  cached: compress(a), θ
    backward   ∇a = opᵀ(·, θ)(∇z)            exact
               ∇θ = opᵀ(â, ·)(∇z)            â = decompress(compress(a))

(paper, Equations 2 and 3). Both transposes are derived from the operation itself, so
that JAX's own rules decide their dtypes, precision and shardings.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import opt_einsum
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dropit_jax import derivatives, shardings, sharing
from dropit_jax.policy import DropIT, check_policy
from dropit_jax.residual import Residual, compress

# The name of what is cached, for `jax.checkpoint_policies.save_only_these_names`.
RESIDUAL_NAME = "dropit"


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an operand is to be read as (batch, *positions, channels).

    Attributes:
      order: its axes, those of the samples first, those of the channels last.
      channel_axes: how many of the last are the channels.
    """

    order: tuple[int, ...]
    channel_axes: int = 1


_Observe = Callable[[Array, Layout, int], None]
_observer: contextvars.ContextVar[_Observe | None]
_observer = contextvars.ContextVar("observer", default=None)


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
    """`lax.dot_general` that caches `lhs` compressed.

    Args:
      lhs: the activation.
      rhs: the kernel.
      dimension_numbers: as in `lax.dot_general`, and so are `precision`,
        `preferred_element_type` and `out_sharding`.
      dropit: what of `lhs` to keep for the gradient of `rhs`. The leading axis of a
        sample is the first that is not contracted; chunks run along the contracted
        axes, which together are the channels. `None`: the plain operation.
      key: a PRNG key, for policies that need one.
      operation: what computes the product: a function with the signature of
        `lax.dot_general`, linear in each operand.

    Returns:
      The product, bit-identical to `operation`'s. The gradient of `lhs` is exact, that
      of `rhs` is the one that `operation` has at the sparse `lhs`.

    Raises:
      TypeError: `lhs` is not a real floating-point array, or forward-mode
        differentiation was asked for, which the operation does not have.
      ValueError: where a gradient is asked for, `lhs` does not suit the policy, or the
        key that it needs is missing.
    """
    kwargs: dict[str, Any] = {"precision": precision}
    # Replacements of `lax.dot_general` seldom take these, and seldom are they given.
    if preferred_element_type is not None:
        kwargs["preferred_element_type"] = preferred_element_type
    if out_sharding is not None:
        kwargs["out_sharding"] = out_sharding

    def product(lhs: Array, rhs: Array) -> Array:
        return operation(lhs, rhs, dimension_numbers, **kwargs)

    if dropit is None:
        return product(lhs, rhs)
    (contracted, _), _ = dimension_numbers
    others = [i for i in range(jnp.ndim(lhs)) if i not in contracted]
    layout = Layout((*others, *contracted), len(contracted))
    return cached_product(product, lhs, rhs, dropit=dropit, layout=layout, key=key)


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
    """`lax.conv_general_dilated` that caches `lhs` compressed.

    Args:
      lhs: the activation.
      rhs: the kernel.
      window_strides: as in `lax.conv_general_dilated`, and so are all arguments up to
        `out_sharding`.
      dropit: what of `lhs` to keep for the gradient of `rhs`. Samples are cut in the
        order (batch, spatial axes, features), whatever the layout of `lhs`. `None`:
        the plain operation.
      key: a PRNG key, for policies that need one.
      operation: what computes the product: a function with the signature of
        `lax.conv_general_dilated`, linear in each operand.

    Returns:
      The convolution, bit-identical to `operation`'s. The gradient of `lhs` is exact,
      that of `rhs` is the one that `operation` has at the sparse `lhs`.

    Raises:
      TypeError: `lhs` is not a real floating-point array, or forward-mode
        differentiation was asked for, which the operation does not have.
      ValueError: where a gradient is asked for, `lhs` does not suit the policy, or the
        key that it needs is missing.
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

    def product(lhs: Array, rhs: Array) -> Array:
        return operation(lhs, rhs, window_strides, padding, **kwargs)

    if dropit is None:
        return product(lhs, rhs)
    dimensions = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    batch, features, *spatial = dimensions.lhs_spec
    layout = Layout((batch, *spatial, features))
    return cached_product(product, lhs, rhs, dropit=dropit, layout=layout, key=key)


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
    """`jax.numpy.einsum` of two operands that caches `lhs` compressed.

    Args:
      equation: as in `jax.numpy.einsum`, with an explicit result ("->").
      lhs: the activation.
      rhs: the kernel.
      dropit: what of `lhs` to keep for the gradient of `rhs`. The axes that are summed
        over with the kernel are the channels. `None`: the plain operation.
      key: a PRNG key, for policies that need one.
      operation: what computes the product: a function with the signature of
        `jax.numpy.einsum`, linear in each operand.
      **kwargs: other arguments of `jax.numpy.einsum`.

    Returns:
      The product, bit-identical to `operation`'s. The gradient of `lhs` is exact, that
      of `rhs` is the one that `operation` has at the sparse `lhs`.

    Raises:
      TypeError, ValueError: as `dot_general`; and the equation is not of two operands
        and a result.
    """

    def product(lhs: Array, rhs: Array) -> Array:
        return operation(equation, lhs, rhs, **kwargs)

    if dropit is None:
        return product(lhs, rhs)
    layout = einsum_layout(equation, lhs, rhs)
    return cached_product(product, lhs, rhs, dropit=dropit, layout=layout, key=key)


def einsum_layout(equation: str, lhs: Array, rhs: Array) -> Layout:
    """The layout of `lhs` in an einsum."""
    if equation.count("->") != 1 or equation.count(",") != 1:
        raise ValueError(
            "DropIT takes einsum equations of two operands and a result, such as "
            f"'bd,dh->bh', got {equation!r}."
        )
    operands, result, _ = opt_einsum.parser.parse_einsum_input(
        (equation.replace(" ", ""), lhs, rhs)
    )
    activation, kernel = operands.split(",")
    channels = [i for i, c in enumerate(activation) if c in kernel and c not in result]
    others = [i for i in range(len(activation)) if i not in channels]
    return Layout((*others, *channels), len(channels))


def cached_product(
    product: Callable[..., Array],
    lhs: Float[Array, "..."],
    rhs: Array,
    offset: Any = (),
    *,
    dropit: DropIT,
    layout: Layout,
    key: Array | None = None,
) -> Array:
    """`product(lhs, rhs, *offset)`, caching `lhs` compressed.

    The rule that the operations above share, for any product.

    Args:
      product: a function, linear in each of `lhs` and `rhs`, to whose result the
        arrays of `offset` may be added: a layer's bias.
      lhs: the activation.
      rhs: the kernel.
      offset: a tuple of arrays, whose gradient is exact.
      dropit: what of `lhs` to keep for the gradient of `rhs`.
      layout: which axes of `lhs` are the samples and the channels.
      key: a PRNG key, for policies that need one.

    Raises:
      TypeError, ValueError: as `dot_general`.
    """
    check_policy(dropit)
    observe = _observer.get()
    nbytes = None if observe is None else _bytes_cached(lhs, dropit, layout)
    if observe is not None and nbytes is not None:
        observe(lhs, layout, nbytes)
    ahead = _cached_ahead(lhs, rhs, dropit, layout, key)
    with _forward_mode_explained():
        return _cached_product(product, dropit, layout, lhs, rhs, offset, key, ahead)


@contextlib.contextmanager
def observed(observe: _Observe) -> Iterator[None]:
    """Tells of every caching operation: its `lhs`, the layout, the bytes it caches."""
    token = _observer.set(observe)
    try:
        yield
    finally:
        _observer.reset(token)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("residual",), meta_fields=("group",)
)
@dataclasses.dataclass(frozen=True)
class _Cached:
    """The compressed `a`, and the group of what is sharded like `a`."""

    residual: Residual
    group: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _cached_product(
    product: Callable[..., Array],
    dropit: DropIT,
    layout: Layout,
    lhs: Array,
    rhs: Array,
    offset: tuple[Array, ...],
    key: Array | None,
    ahead: _Cached | None,
) -> Array:
    del dropit, layout, key, ahead
    return product(lhs, rhs, *offset)


# What is cached of `a` (`None`: θ is frozen), θ, offset, and opᵀ(·, θ).
_Saved = tuple[
    _Cached | None, Array, tuple[Array, ...], Callable[[Array], tuple[Array]]
]


def _forward(
    product: Callable[..., Array],
    dropit: DropIT,
    layout: Layout,
    lhs: Any,
    rhs: Any,
    offset: Any,
    key: Any,
    ahead: Any,
) -> tuple[Array, _Saved]:
    a, kernel, added, key, ahead = jax.tree.map(
        lambda operand: operand.value,
        (lhs, rhs, offset, key, ahead),
        is_leaf=lambda node: hasattr(node, "perturbed"),
    )
    cached = None
    if rhs.perturbed:  # a frozen kernel has no gradient: nothing of `a` to cache
        cached = _compressed(a, dropit, layout, key) if ahead is None else ahead
        once = derivatives.once(a, "DropIT")
        # Without the barrier XLA may compress late, which keeps `a` alive till then.
        a, _ = lax.optimization_barrier((once, cached.residual))
    z, pullback_a = jax.vjp(lambda a: product(a, kernel, *added), a)
    return z, (cached, kernel, added, pullback_a)


def _backward(
    product: Callable[..., Array],
    dropit: DropIT,
    layout: Layout,
    saved: _Saved,
    cotangent: Array,
) -> tuple[Array, Array | None, Any, None, None]:
    del dropit
    cached, kernel, offset, pullback_a = saved
    if cached is not None:
        # Without the barrier XLA may decompress early, which keeps the dense â alive
        # through the whole forward pass.
        cached, cotangent = lax.optimization_barrier((cached, cotangent))
    (to_a,) = pullback_a(cotangent)
    if cached is None and not offset:
        return to_a, None, (), None, None
    a_hat = jnp.zeros_like(to_a)  # nothing of it reaches the offset's gradient
    if cached is not None:
        a_hat = _restore(cached.residual.decompress(), layout, to_a)
        a_hat = shardings.join(a_hat, cached.group)
    _, pullback = jax.vjp(functools.partial(product, a_hat), kernel, *offset)
    to_kernel, *to_offset = pullback(cotangent)
    to_kernel = None if cached is None else to_kernel
    return to_a, to_kernel, tuple(to_offset), None, None


# Symbolic zeros tell the forward rule which operands are differentiated.
_cached_product.defvjp(_forward, _backward, symbolic_zeros=True)


def _cached_ahead(
    lhs: Array, rhs: Array, dropit: DropIT, layout: Layout, key: Array | None
) -> _Cached | None:
    """What is cached of `lhs`, before it is known whether anything has to be.

    The forward rule of an operation in a loop, a checkpoint or an inner `jax.jit` is
    traced on its own, where nothing shows that two operations read the same array;
    here it shows. What turns out not to be needed XLA leaves out. `None` where nothing
    can be differentiated, or an error is due if something is: the forward rule's.
    """
    if not isinstance(rhs, jax.core.Tracer):
        return None
    operands = (lhs,) if key is None else (lhs, key)
    with contextlib.suppress(TypeError, ValueError):
        return sharing.once(
            lambda: _compressed(lax.stop_gradient(lhs), dropit, layout, key),
            operands,
            (dropit, layout),
        )
    return None


def _compressed(a: Array, dropit: DropIT, layout: Layout, key: Array | None) -> _Cached:
    group = shardings.new_group()
    arranged = _arrange(shardings.join(a, group), dropit, layout)
    residual = compress(arranged, dropit, key)
    return _Cached(checkpoint_name(residual, RESIDUAL_NAME), group)


def _bytes_cached(lhs: Array, dropit: DropIT, layout: Layout) -> int | None:
    """Bytes that are cached of `lhs`; `None` where it does not suit the policy."""

    def compressed(a: Array, key: Array) -> Residual:
        return compress(_arrange(a, dropit, layout), dropit, key)

    try:
        return jax.eval_shape(compressed, lhs, jax.random.key(0)).nbytes
    except (TypeError, ValueError):
        return None  # which the forward rule says, if a gradient is asked for


def _arrange(a: Array, dropit: DropIT, layout: Layout) -> Array:
    """The operand as (batch, *positions, channels)."""
    ordered = jnp.transpose(a, layout.order)
    if layout.channel_axes == 1 or not dropit.per_channel:
        return ordered  # chunks need no merging of axes
    lead = ordered.ndim - layout.channel_axes
    merged = (*ordered.shape[:lead], math.prod(ordered.shape[lead:]))
    return shardings.gather(ordered, keep=lead).reshape(merged)


def _restore(arranged: Array, layout: Layout, operand: Array) -> Array:
    """The inverse of `_arrange`, for an operand of this shape and sharding."""
    ordered = arranged.reshape([operand.shape[axis] for axis in layout.order])
    restored = jnp.transpose(ordered, tuple(np.argsort(layout.order)))
    return shardings.like(restored, operand)


@contextlib.contextmanager
def _forward_mode_explained() -> Iterator[None]:
    try:
        yield
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise TypeError(
            "DropIT has no forward-mode differentiation (jax.jvp, jax.jacfwd, "
            "jax.linearize): it is an approximation of the reverse mode. Use jax.grad "
            "or jax.vjp, or dropit=None."
        ) from error
