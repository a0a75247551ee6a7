"""Arrays that may be differentiated once, and no more."""

import functools
from typing import Any

import jax
from jaxtyping import Array


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def once(x: Array, what: str) -> Array:
    """`x`, for a forward rule that caches something of it without a derivative.

    To differentiate the rule, which is to differentiate a second time, would leave out
    what reaches the gradient through the cache.

    Args:
      x: what the rule is given.
      what: the operation, as the error names it.

    Raises:
      TypeError: where it is differentiated.
    """
    del what
    return x


@once.defjvp
def _refused(what: str, primals: Any, tangents: Any) -> Any:
    del primals, tangents
    raise TypeError(
        f"{what} has no second derivative (jax.hessian, jax.grad of jax.grad): what it "
        "caches for the first has none. Use the plain Flax layer or jax.nn function."
    )
