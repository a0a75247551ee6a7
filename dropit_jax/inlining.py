"""Functions whose operands XLA's CPU compiler computes once."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.xla_metadata import set_xla_metadata


def not_inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function as a call that XLA may not inline.

    What keeps an activation reads it several times: for every pass of a selection, for
    minimum, maximum and codes. XLA's CPU compiler, where it can, computes the
    activation anew for each: it takes a normalisation and a rectifier for cheap. It
    cannot look out of a call. Nor can it mix what is inside with what is around it,
    which differs from layer to layer: loops that are the same it compiles once. For
    `platforms.by_platform(..., cpu=...)`.
    """

    @jax.jit
    def inside(*operands: Any) -> Any:
        # A call in a fusion ends the compiler: what is called in here is inlined.
        with set_xla_metadata(inlineable="true"):
            return function(*operands)

    def call(*operands: Any) -> Any:
        with set_xla_metadata(inlineable="false"):
            return inside(*operands)

    return call
