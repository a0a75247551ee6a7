"""Makes functions into calls that XLA's CPU compiler does not inline.

In versions of JAX below 0.12 that compiler removes barriers before it decides when to
compute an operation, and which operations to compute twice. It can neither look into a
call nor move a call before its operands.
"""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from dropit_jax.compat import set_xla_metadata


def not_inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that runs `function` in a call that XLA does not inline.

    Compression reads an activation several times: in every pass of a selection, and
    for the minimum, the maximum and the codes. Without the call, XLA's CPU compiler may
    recompute the activation for each pass, since a normalisation and a ReLU seem cheap
    to it. It also fuses the passes with the code around them, which differs from layer
    to layer, and compiles equal loops again for each layer.

    Pass the result as `cpu=` or `one_cpu=` to `by_platform`.
    """

    def call(*operands: Any) -> Any:
        # As a context it would also mark the loops within, whose bodies are calls.
        return set_xla_metadata(jax.jit(function)(*operands), inlineable="false")

    return call


def call_after_operand(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `not_inlined(function)` with a first operand that the call waits for.

    Without the operand, XLA chooses when to decompress a residual for the backward
    pass. It may do so in the forward pass, and keep the activation until the backward
    pass.

    Args:
      function: a function of arrays.

    Returns:
      A function of the array to wait for and of the arguments of `function`.
    """

    def late(after: Array, *operands: Array) -> Any:
        del after  # it remains an operand of the call
        return function(*operands)

    return not_inlined(late)
