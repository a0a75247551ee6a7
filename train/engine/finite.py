"""Checks that the values of a state are finite, and not too large for a norm."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

# The number of names in a message.
_LONGEST = 3
# The square of a larger value is infinite in float32, and so is any norm.
_LARGEST = float(np.sqrt(np.finfo(np.float32).max))


def problem(state: Any) -> str:
    """Returns an error message about NaN and too large values; "" if there are none.

    A value is too large if its square is infinite in float32, or if it is infinite.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    floating = [(path, x) for path, x in flat if jnp.issubdtype(x.dtype, jnp.floating)]
    finite = jax.device_get(_finite([x for _, x in floating]))
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, _), is_finite in zip(floating, finite, strict=True)
        if not is_finite
    ]
    if not names:
        return ""
    more = f" and {len(names) - _LONGEST} more arrays" if names[_LONGEST:] else ""
    return (
        f"{', '.join(names[:_LONGEST])}{more} became infinite, NaN, or larger than 1e19"
    )


@jax.jit
def _finite(arrays: list[Array]) -> list[Bool[Array, ""]]:
    return [
        jnp.all(jnp.abs(x) <= min(_LARGEST, float(jnp.finfo(x.dtype).max)))
        for x in arrays
    ]
