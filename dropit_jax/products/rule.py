"""The derivative of a product that stores its first operand compressed.

For a product `z = op(a, θ)`, linear in each operand:

    forward    z = op(a, θ)                  residuals: compress(a), θ
    backward   ∇a = opᵀ(·, θ)(∇z)            exact
               ∇θ = opᵀ(â, ·)(∇z)            â = decompress(compress(a))

(paper, Equations 2 and 3). JAX transposes the operation at (â, θ) for both, and so
decides dtypes, precision and shardings; the first transpose does not depend on â.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dropit_jax import derivatives
from dropit_jax.policy import DropIT, check_policy
from dropit_jax.products.operand import Axes, CachedOperand, Compression, bytes_cached
from dropit_jax.xla import shardings
from dropit_jax.xla.barriers import barrier


@dataclasses.dataclass(frozen=True)
class Operation:
    """A function of `(lhs, rhs)`: an operation with all its other arguments.

    Objects with equal fields are equal, so `_gradients_traced_once` reuses a trace.

    Attributes:
      function: the operation; takes `(*first, lhs, rhs, *last, **settings)`.
      first: the arguments before the operands.
      last: the arguments after the operands.
      settings: the keyword arguments, as (name, value) pairs.
    """

    function: Callable[..., Array]
    first: tuple[Any, ...] = ()
    last: tuple[Any, ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(
        cls,
        function: Callable[..., Array],
        *last: Any,
        first: tuple[Any, ...] = (),
        **settings: Any,
    ) -> "Operation":
        """Returns an operation; turns lists in its arguments into tuples."""
        pairs = ((name, _as_tuples(value)) for name, value in settings.items())
        return cls(function, first, _as_tuples(last), tuple(pairs))

    def __call__(self, lhs: Array, rhs: Array) -> Array:
        """Returns the product."""
        return self.function(*self.first, lhs, rhs, *self.last, **dict(self.settings))


_Observe = Callable[[Array, int], None]
_observer: contextvars.ContextVar[_Observe | None]
_observer = contextvars.ContextVar("observer", default=None)


def cached_product(
    product: Callable[..., Array],
    lhs: Float[Array, "..."],
    rhs: Array,
    offset: Any = (),
    *,
    dropit: DropIT,
    axes: Axes,
    key: Array | None = None,
) -> Array:
    """Returns `product(lhs, rhs, *offset)`, and stores `lhs` compressed.

    Args:
      product: a function `(lhs, rhs, *offset)`: a product, linear in each operand, to
        which it may add the arrays of `offset`.
      lhs: the activation, whose gradient is exact.
      rhs: the kernel, whose gradient is computed from the decompressed `lhs`.
      offset: a tuple of arrays, such as a layer's bias; their gradients are exact.
      dropit: the policy for `lhs`.
      axes: the order of the axes of `lhs`.
      key: a PRNG key, for policies that need one.

    Raises:
      TypeError, ValueError: as `dot_general`.
    """
    check_policy(dropit)
    observe = _observer.get()
    nbytes = None if observe is None else bytes_cached(lhs, dropit, axes)
    if observe is not None and nbytes is not None:
        observe(lhs, nbytes)
    compression = Compression(dropit, axes, shardings.new_group())
    with _forward_mode_explained():
        return _cached_product(product, compression, lhs, rhs, offset, key)


@contextlib.contextmanager
def observed(observe: _Observe) -> Iterator[None]:
    """Calls `observe(lhs, nbytes)` for every `cached_product` traced in the context.

    `nbytes` are the bytes of the residual of `lhs`, whether or not the product is
    differentiated. A product whose `lhs` the policy cannot store is left out. In nested
    contexts only the innermost function is called.
    """
    token = _observer.set(observe)
    try:
        yield
    finally:
        _observer.reset(token)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cached_product(
    product: Callable[..., Array],
    compression: Compression,
    lhs: Array,
    rhs: Array,
    offset: tuple[Array, ...],
    key: Array | None,
) -> Array:
    del compression, key
    return product(lhs, rhs, *offset)


# The residual of `a`, θ, the offset, and `None`; if θ is frozen, `None` for the
# residual and, last, the function opᵀ(·, θ).
_Saved = tuple[
    CachedOperand | None,
    Array,
    tuple[Array, ...],
    Callable[[Array], tuple[Array]] | None,
]


def _forward(
    product: Callable[..., Array],
    compression: Compression,
    lhs: Any,
    rhs: Any,
    offset: Any,
    key: Any,
) -> tuple[Array, _Saved]:
    a, kernel, added, key = jax.tree.map(
        lambda operand: operand.value,
        (lhs, rhs, offset, key),
        is_leaf=lambda node: hasattr(node, "perturbed"),
    )
    if not rhs.perturbed:  # a frozen kernel has no gradient, and needs no residual
        z, pullback_a = jax.vjp(lambda a: product(a, kernel, *added), a)
        return z, (None, kernel, added, pullback_a)
    cached = compression(a, key)
    once = derivatives.differentiable_once(a, "DropIT")
    # Without the barrier XLA may compress late, and keep `a` in memory until then.
    a, _ = barrier((once, cached.residual))
    return product(a, kernel, *added), (cached, kernel, added, None)


def _backward(
    product: Callable[..., Array],
    compression: Compression,
    saved: _Saved,
    cotangent: Array,
) -> tuple[Array, Array | None, Any, None]:
    cached, kernel, offset, pullback_a = saved
    if cached is None:
        assert pullback_a is not None
        (to_a,) = pullback_a(cotangent)
        if not offset:
            return to_a, None, (), None
        zeros = jnp.zeros_like(to_a)  # the offset's gradient does not depend on `a`
        to_offset = jax.vjp(functools.partial(product, zeros, kernel), *offset)[1]
        return to_a, None, to_offset(cotangent), None
    cotangent = compression.axes.laid_out(cotangent)
    a_hat = cached.restored(compression.axes, cotangent)
    # Without the barrier XLA may compute the kernel gradients of many layers together,
    # late, and keep the â and cotangents of all of them in memory until then.
    a_hat, cotangent = barrier((a_hat, cotangent))
    gradients = _gradients_traced_once if _is_of_jax(product) else _gradients
    to_a, to_kernel, *rest = gradients(product, cotangent, a_hat, kernel, *offset)
    return to_a, to_kernel, tuple(rest), None


# Symbolic zeros tell the forward rule which operands are differentiated.
_cached_product.defvjp(_forward, _backward, symbolic_zeros=True)


def _gradients(
    product: Callable[..., Array], cotangent: Array, *operands: Array
) -> tuple[Array, ...]:
    """Returns the gradients of all operands of a product for a cotangent."""
    _, pullback = jax.vjp(product, *operands)
    return pullback(cotangent)


_OF_JAX = (lax.dot_general, lax.conv_general_dilated, jnp.einsum)
_gradients_traced_once = jax.jit(_gradients, static_argnums=0, inline=True)


def _is_of_jax(product: Callable[..., Array]) -> bool:
    """Returns whether a product is a function of JAX with hashable arguments.

    The trace of its gradients may be reused for an equal product. Another product may
    be a Flax module, which equals a module of other parameters.
    """
    if not isinstance(product, Operation) or product.function not in _OF_JAX:
        return False
    try:
        hash(product)
    except TypeError:
        return False
    return True


def _as_tuples(value: Any) -> Any:
    """Returns a value with lists as tuples: `[1, (2, [3])]` -> `(1, (2, (3,)))`."""
    if not isinstance(value, (list, tuple)) or hasattr(value, "_fields"):
        return value
    return tuple(map(_as_tuples, value))


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
