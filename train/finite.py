"""Whether a state has values that are infinite or not a number."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

# Names that are told.
_LONGEST = 3


def problem(state: Any) -> str:
    """Returns which arrays of a pytree are not finite; empty if all are."""
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
    return f"{', '.join(names[:_LONGEST])}{more} became infinite or NaN"


@jax.jit
def _finite(arrays: list[Array]) -> list[Bool[Array, ""]]:
    return [jnp.all(jnp.isfinite(x)) for x in arrays]
