"""`flax.linen.dot_product_attention`, with a softmax that has a derivative of its own.

    weights  w = softmax(query · keyᵀ / √depth + bias)        of each row, and dropout
    result   o = w · value
    tangent  dw = w (ds - Σ w ds)                              s: the scores

Flax leaves it to JAX to differentiate the softmax operation by operation, which takes
several passes more over what is as large as the square of the length. The value is
Flax's to the last bit; the derivative is the same but for rounding.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax.linen import dtypes
from jaxtyping import Array, Float, Shaped

# Arguments of Flax's function beside the arrays; those that are functions are left out.
OPTIONS = frozenset(
    {
        "broadcast_dropout",
        "dropout_rate",
        "deterministic",
        "dtype",
        "precision",
        "force_fp32_for_softmax",
    }
)


def suits(query: Array, key: Array, value: Array) -> bool:
    """Whether the shapes go together; if not, Flax's function says why."""
    if not query.ndim == key.ndim == value.ndim >= 3:
        return False
    *batch, length, heads, depth = key.shape
    return query.shape == (*batch, query.shape[-3], heads, depth) and value.shape[
        :-1
    ] == (*batch, length, heads)


def attend(
    query: Float[Array, "*batch q_length heads depth"],
    key: Float[Array, "*batch kv_length heads depth"],
    value: Float[Array, "*batch kv_length heads v_depth"],
    bias: Shaped[Array, "..."] | None = None,
    mask: Shaped[Array, "..."] | None = None,
    dropout_rng: Any = None,
    *,
    broadcast_dropout: bool = True,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: jax.typing.DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
    force_fp32_for_softmax: bool = False,
) -> Float[Array, "*batch q_length heads v_depth"]:
    """The function of Flax, whose arguments these are."""
    query, key, value = dtypes.promote_dtype(query, key, value, dtype=dtype)
    dtype = query.dtype
    query = query / jnp.sqrt(query.shape[-1]).astype(dtype)
    scores = jnp.einsum("...qhd,...khd->...hqk", query, key, precision=precision)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(dtype).min)
    if force_fp32_for_softmax and dtype != jnp.float32:
        weights = softmax(scores.astype(jnp.float32))
    else:
        weights = softmax(scores).astype(dtype)
    if dropout_rate > 0 and not deterministic:
        kept = 1.0 - dropout_rate
        shape = weights.shape
        if broadcast_dropout:
            shape = (*[1] * (key.ndim - 2), *shape[-2:])
        keep = jax.random.bernoulli(dropout_rng, kept, shape)
        weights = weights * (keep.astype(dtype) / jnp.asarray(kept, dtype))
    return jnp.einsum("...hqk,...khd->...qhd", weights, value, precision=precision)


@jax.custom_jvp
def softmax(scores: Float[Array, "*rows length"]) -> Float[Array, "*rows length"]:
    """`jax.nn.softmax` of each row."""
    return jax.nn.softmax(scores)


@softmax.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (scores,), (tangent,) = primals, tangents
    weights = softmax(scores)
    mean = jnp.sum(weights * tangent, axis=-1, keepdims=True)
    return weights, weights * (tangent - mean)
