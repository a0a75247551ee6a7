"""Functions that XLA's CPU compiler leaves as calls.

It heeds no barriers: it takes them out before it decides what is computed when, and
what twice. A call it can neither look into nor move before its operands.
"""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from dropit_jax.compat import set_xla_metadata


def not_inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function as a call that XLA may not inline.

    What keeps an activation reads it several times: for every pass of a selection, for
    minimum, maximum and codes. XLA's CPU compiler, where it can, computes the
    activation anew for each: it takes a normalisation and a rectifier for cheap. It
    cannot look out of a call. Nor can it mix what is inside with what is around it,
    which differs from layer to layer: loops that are the same it compiles once. For
    `platforms.by_platform(..., cpu=...)`.
    """

    def call(*operands: Any) -> Any:
        # A context would mark loops within, too: what XLA calls in them.
        return set_xla_metadata(jax.jit(function)(*operands), inlineable="false")

    return call


def waiting(function: Callable[..., Any]) -> Callable[..., Any]:
    """`not_inlined(function)`, called no sooner than one more operand is computed.

    What is rebuilt from a residual for the gradient is else rebuilt when XLA likes, and
    it likes to at once: in the forward pass, to keep it till the gradient.

    Args:
      function: of arrays.

    Returns:
      A function of the array to wait for and of those of `function`.
    """

    def late(after: Array, *operands: Array) -> Any:
        del after  # an operand of the call all the same
        return function(*operands)

    return not_inlined(late)
