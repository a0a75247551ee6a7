"""The rule of a product that caches a compressed first operand.

For a product `z = op(a, θ)`, linear in each operand:

    forward    z = op(a, θ)                  cached: compress(a), θ
    backward   ∇a = opᵀ(·, θ)(∇z)            exact
               ∇θ = opᵀ(â, ·)(∇z)            â = decompress(compress(a))

(paper, Equations 2 and 3). Both transposes are the operation's own at (â, θ), and the
first does not depend on â: JAX's rules decide their dtypes, precision and shardings.
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

from dropit_jax import deferral, derivatives, sharing
from dropit_jax.policy import DropIT, check_policy
from dropit_jax.products.operand import Axes, CachedOperand, Compression, bytes_cached
from dropit_jax.xla.barriers import barrier


@dataclasses.dataclass(frozen=True)
class Operation:
    """A product as an operation and its settings: equal ones are traced once.

    Attributes:
      function: of what comes before the operands, the operands, and what comes after.
      first: its first arguments.
      last: its last arguments.
      settings: its keyword arguments, as pairs.
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
        """An operation, with lists in its arguments as tuples."""
        pairs = ((name, _as_tuples(value)) for name, value in settings.items())
        return cls(function, first, _as_tuples(last), tuple(pairs))

    def __call__(self, lhs: Array, rhs: Array) -> Array:
        """The product."""
        return self.function(*self.first, lhs, rhs, *self.last, **dict(self.settings))


_Observe = Callable[[Array, Axes, int], None]
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
    """`product(lhs, rhs, *offset)`, caching `lhs` compressed.

    Args:
      product: a function, linear in each of `lhs` and `rhs`, to whose result the
        arrays of `offset` may be added: a layer's bias.
      lhs: the activation.
      rhs: the kernel.
      offset: a tuple of arrays, whose gradient is exact.
      dropit: what of `lhs` to keep for the gradient of `rhs`.
      axes: which of `lhs` are the samples and the channels.
      key: a PRNG key, for policies that need one.

    Raises:
      TypeError, ValueError: as `dot_general`.
    """
    check_policy(dropit)
    observe = _observer.get()
    nbytes = None if observe is None else bytes_cached(lhs, dropit, axes)
    if observe is not None and nbytes is not None:
        observe(lhs, axes, nbytes)
    compression = Compression.of(lhs, dropit, axes, key)
    call = _Call(compression, sharing.run_of(lhs), deferral.Origin(lhs))
    with _forward_mode_explained():
        return _cached_product(product, call, lhs, rhs, offset, key)


@contextlib.contextmanager
def observed(observe: _Observe) -> Iterator[None]:
    """Tells of every caching operation: its `lhs`, its axes, the bytes it caches."""
    token = _observer.set(observe)
    try:
        yield
    finally:
        _observer.reset(token)


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    """One call of a caching product, without its arrays.

    Attributes:
      compression: compresses the first operand.
      run: the number of the calls that come one after the other with that operand.
      origin: where that operand comes from.
    """

    compression: Compression
    run: int
    origin: deferral.Origin


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cached_product(
    product: Callable[..., Array],
    call: _Call,
    lhs: Array,
    rhs: Array,
    offset: tuple[Array, ...],
    key: Array | None,
) -> Array:
    del call, key
    return product(lhs, rhs, *offset)


# What is cached of `a`, θ, offset; and opᵀ(·, θ) instead of the first, if θ is frozen.
_Saved = tuple[
    CachedOperand | None,
    Array,
    tuple[Array, ...],
    Callable[[Array], tuple[Array]] | None,
]


def _forward(
    product: Callable[..., Array],
    call: _Call,
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
    if not rhs.perturbed:  # a frozen kernel has no gradient: nothing of `a` to cache
        z, pullback_a = jax.vjp(lambda a: product(a, kernel, *added), a)
        return z, (None, kernel, added, pullback_a)
    operands = (a,) if key is None else (a, key)
    cached = deferral.computed(call.compression, call.origin, *operands)
    once = derivatives.once(a, "DropIT")
    # Without the barrier XLA may compress late, which keeps `a` alive till then.
    a, _ = barrier((once, cached.residual))
    return product(a, kernel, *added), (cached, kernel, added, None)


def _backward(
    product: Callable[..., Array], call: _Call, saved: _Saved, cotangent: Array
) -> tuple[Array, Array | None, Any, None]:
    axes, run = call.compression.axes, call.run
    cached, kernel, offset, pullback_a = saved
    if cached is None:
        assert pullback_a is not None
        (to_a,) = pullback_a(cotangent)
        if not offset:
            return to_a, None, (), None
        zeros = jnp.zeros_like(to_a)  # nothing of it reaches the offset's gradient
        to_offset = jax.vjp(functools.partial(product, zeros, kernel), *offset)[1]
        return to_a, None, to_offset(cotangent), None
    cotangent = axes.laid_out(cotangent)
    # After the first cotangent of a run; the last to use it ends its life.
    a_hat = sharing.once(
        lambda: cached.restored(axes, cotangent),
        tuple(jax.tree.leaves(cached)),
        (jax.tree.structure(cached), axes, run),
    )
    # Without the barrier XLA may decompress for many layers in one kernel, late, which
    # keeps all their â and cotangents alive until then.
    a_hat, cotangent = barrier((a_hat, cotangent))
    gradients = _gradients_traced_once if _is_of_jax(product) else _gradients
    to_a, to_kernel, *rest = gradients(product, cotangent, a_hat, kernel, *offset)
    return to_a, to_kernel, tuple(rest), None


# Symbolic zeros tell the forward rule which operands are differentiated.
_cached_product.defvjp(_forward, _backward, symbolic_zeros=True)


def _gradients(
    product: Callable[..., Array], cotangent: Array, *operands: Array
) -> tuple[Array, ...]:
    """The gradients of all operands."""
    _, pullback = jax.vjp(product, *operands)
    return pullback(cotangent)


_OF_JAX = (lax.dot_general, lax.conv_general_dilated, jnp.einsum)
_gradients_traced_once = jax.jit(_gradients, static_argnums=0, inline=True)


def _is_of_jax(product: Callable[..., Array]) -> bool:
    """Whether it is an operation of JAX, which means the same wherever it is equal.

    Another may be a Flax module, which equals one of other parameters.
    """
    if not isinstance(product, Operation) or product.function not in _OF_JAX:
        return False
    try:
        hash(product)
    except TypeError:
        return False
    return True


def _as_tuples(value: Any) -> Any:
    """The value, with tuples for all lists in it."""
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
