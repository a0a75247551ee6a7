"""Attention that computes its scores anew in the backward pass."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from jaxtyping import Array, Float, Shaped

from dropit_jax.nn import attention_core as core
from dropit_jax.nn.recompute import recompute
from dropit_jax.xla import layouts


def dot_product_attention(
    query: Float[Array, "*batch q_length heads depth"],
    key: Float[Array, "*batch kv_length kv_heads depth"],
    value: Float[Array, "*batch kv_length kv_heads v_depth"],
    bias: Shaped[Array, "..."] | None = None,
    mask: Shaped[Array, "..."] | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Shaped[Array, "..."] | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable[..., Array] | None = None,
    qk_attn_weights_einsum: Callable[..., Array] | None = None,
    attn_weights_value_einsum: Callable[..., Array] | None = None,
    *,
    promote_dtype: Callable[..., Any] | None = None,
    is_causal: bool | None = None,
    bits: int | None = None,
) -> Float[Array, "*batch q_length heads v_depth"]:
    """`softmax(query · keyᵀ / √depth + bias) · value`; caches its arguments alone.

    It is Flax's function of the same name under `jax.checkpoint`: the value is Flax's,
    and so is the gradient but for rounding (`dropit_jax.nn.attention_core`), but of the
    scores, as large as the square of the length, nothing stays from the forward pass,
    neither they nor their softmax, its dropout, or their sum with the mask. The
    backward pass computes the first of its two products, and what is between them, a
    second time.

    With `bits=8` query, key and value are cached in 8 bits, and the gradient is the
    exact one at what these stand for (`dropit_jax.nn.recompute`).

    It serves as the `attention_fn` of `flax.linen.MultiHeadDotProductAttention` and of
    `flax.nnx.MultiHeadAttention`. Where `is_causal` or `promote_dtype` is given, as the
    latter does, it is `flax.nnx.dot_product_attention`, which has these arguments, and
    else `flax.linen.dot_product_attention`.

    Args:
      query: as all other arguments, described by Flax. All arrays are cached as given.
      key: as many heads as the query, or, for `flax.nnx`, fewer.
      value: as the key.
      bias: broadcasts to `(*batch, heads, q_length, kv_length)`, as does the mask.
      mask: where to attend.
      broadcast_dropout: whether all of the batch and heads share a dropout mask.
      dropout_rng: a PRNG key.
      dropout_rate: of the softmax.
      deterministic: whether to leave out dropout.
      dtype: of the computation.
      precision: of the products.
      module: where to sow the weights. With it this is the plain Flax function: the
        weights stay with the module in any case.
      force_fp32_for_softmax: `flax.linen` alone.
      einsum_dot_general: `flax.linen` alone.
      qk_attn_weights_einsum: `flax.linen` alone. With a module here or below this is
        the plain Flax function: the variables of a module cannot be reached from within
        `jax.checkpoint`.
      attn_weights_value_einsum: `flax.linen` alone.
      promote_dtype: `flax.nnx` alone.
      is_causal: `flax.nnx` alone.
      bits: 8, or `None`: query, key and value are cached as they are; so they are
        beside functions of the user's own, which may hold what cannot be recomputed.

    Raises:
      ValueError: `bits` is neither.
      TypeError: arguments that only `flax.linen` has beside such that only `flax.nnx`
        has. Flax's own errors for others.
    """
    if bits not in (None, 8):
        raise ValueError(f"dot_product_attention takes bits=8 or None, got {bits!r}.")
    function: Callable[..., Array] = nn.dot_product_attention
    # Compared by value where what JAX has traced is looked up.
    options: dict[str, Any] = {
        "broadcast_dropout": bool(broadcast_dropout),
        "dropout_rate": float(dropout_rate),
        "deterministic": bool(deterministic),
        "dtype": dtype,
        "precision": precision,
    }
    linen_options = _given(
        force_fp32_for_softmax=bool(force_fp32_for_softmax) or None,
        einsum_dot_general=einsum_dot_general,
        qk_attn_weights_einsum=qk_attn_weights_einsum,
        attn_weights_value_einsum=attn_weights_value_einsum,
    )
    nnx_options = _given(
        promote_dtype=promote_dtype,
        is_causal=None if is_causal is None else bool(is_causal),
    )
    if nnx_options:
        if linen_options:
            raise TypeError(
                f"{', '.join(linen_options)} of flax.linen.dot_product_attention and "
                f"{', '.join(nnx_options)} of flax.nnx.dot_product_attention do not go "
                "together."
            )
        function = nnx.dot_product_attention
    options |= linen_options | nnx_options
    arrays = (query, key, value, bias, mask, dropout_rng)
    if module is not None:
        return _attend(function, options | {"module": module}, *arrays)
    if any(isinstance(option, nn.Module) for option in options.values()):
        return _attend(function, options, *arrays)
    functions = [f for f in (linen_options | nnx_options).values() if callable(f)]
    if any(f is not nnx.nn.dtypes.promote_dtype for f in functions):
        # Functions may hold tracers, and must not outlive this call.
        return _recomputed(function, **options)(*arrays)
    if bits is not None:
        return recompute(_attending(function, **options), *arrays, compact=(0, 1, 2))
    return _recomputed_once_traced(function, **options)(*arrays)


def _given(**options: Any) -> dict[str, Any]:
    return {name: option for name, option in options.items() if option is not None}


def _attend(
    function: Callable[..., Array],
    options: dict[str, Any],
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    mask: Array | None,
    dropout_rng: Array | None,
) -> Array:
    arrays = (query, key, value, bias, mask)
    ours = function is nn.dot_product_attention and core.OPTIONS.issuperset(options)
    if ours and core.suits(query, key, value):
        return core.attend(*arrays, dropout_rng, **options)
    return function(*arrays, dropout_rng=dropout_rng, **options)


@functools.lru_cache(maxsize=64)
def _attending(function: Callable[..., Array], **options: Any) -> Callable[..., Array]:
    """`_attend`, of operands that lie in memory as its products and 8 bits like."""

    def attend(query: Array, key: Array, value: Array, *others: Array | None) -> Array:
        operands = map(layouts.of_heads, (query, key, value))
        return _attend(function, options, *operands, *others)

    return jax.jit(attend, inline=True)  # traced once for all layers of one shape


def _recomputed(function: Callable[..., Array], **options: Any) -> Callable[..., Array]:
    return jax.checkpoint(functools.partial(_attend, function, options))


# Functions are compared by identity where JAX keeps what it has traced.
_recomputed_once_traced = functools.lru_cache(maxsize=64)(_recomputed)
