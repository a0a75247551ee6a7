"""One call of a Flax layer without a product: of a norm, of dropout, or of attention.

Here are the layers of Flax that a preset has compact twins for, and those that it has
none for. Where it has, Flax's own code runs, the gradient is the twin's, and what both
cache is told.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from dropit_jax import compat, hooks
from dropit_jax import nn as compact
from dropit_jax.linen import calls, functions, norms, stochastic


@dataclasses.dataclass(frozen=True)
class Part:
    """Layers that cache no input of a product.

    Attributes:
      kinds: Flax's classes.
      bits: what their compact twins cache of an element.
      twins: the classes of these, where there are any.
    """

    kinds: tuple[type[nn.Module], ...]
    bits: int
    twins: tuple[type[nn.Module], ...] = ()

    @functools.cached_property
    def calls(self) -> frozenset[Any]:
        """The code of their calls."""
        return frozenset(inspect.unwrap(kind.__call__) for kind in self.kinds)


NORM = Part(norms.LAYERS, 8, tuple(getattr(norms, k.__name__) for k in norms.LAYERS))
DROPOUT = Part((nn.Dropout,), 1, (stochastic.Dropout,))
ATTENTION = Part((nn.MultiHeadDotProductAttention,), 8)
PARTS = (NORM, DROPOUT, ATTENTION)

# Layers of Flax that cache something of their own and have no compact twin, the method
# in which they do, and who might expect one: those who want so many bits.
_WITHOUT_TWIN: tuple[tuple[type[nn.Module], str, int], ...] = (
    (nn.RNNCellBase, "__call__", 8),
    (nn.WeightNorm, "__call__", 8),
    (nn.SpectralNorm, "__call__", 8),
    (nn.Embed, "attend", 8),
    (nn.PReLU, "__call__", 1),
)


def part(context: Any) -> Part | None:
    """Returns the kind of Flax's layer whose call an interceptor is told of.

    It is `None` for other calls, and for those of our twins.

    Args:
      context: as in `calls.is_layer_call`.
    """
    call = calls.flax_call(context)
    found = next((each for each in PARTS if call in each.calls), None)
    is_twin = found is not None and isinstance(context.module, found.twins)
    return None if is_twin else found


def without_twin(context: Any) -> int | None:
    """The bits of the twin that is missing, in a call that caches something itself.

    Args:
      context: as in `calls.is_layer_call`.
    """
    if not str(compat.flax_function(context).__module__).startswith("flax."):
        return None
    for kind, method, bits in _WITHOUT_TWIN:
        if isinstance(context.module, kind) and context.method_name == method:
            return bits
    return None


def with_own_call(context: Any) -> nn.Module | int | None:
    """Returns the layer that an interceptor is told of, if its `__call__` is its own.

    Args:
      context: as in `calls.is_layer_call`.

    Returns:
      One of `calls.LAYERS`, without a policy of its own, or the bits of another `Part`.
      Whether the call comes to Flax's nobody knows before.
    """
    module, call = context.module, calls.flax_call(context)
    if context.method_name != "__call__" or call in calls.FLAX_CALLS:
        return None
    if isinstance(module, calls.LAYERS):
        return None if calls.has_policy(module) else module
    for each in PARTS:
        if isinstance(module, each.kinds) and not isinstance(module, each.twins):
            return None if call in each.calls else each.bits
    return None


def other_attention(module: Any, sow_weights: bool) -> str | None:
    """Why the core of attention is to stay as it is; `None`: it is not.

    It is an empty text where that is compact already.
    """
    attend = module.attention_fn
    if getattr(attend, "func", attend) is compact.dot_product_attention:
        return ""
    if attend is not nn.dot_product_attention:
        return f"its attention_fn is {getattr(attend, '__name__', attend)}"
    if sow_weights:
        return "it sows its weights"
    for name in ("qk_attn_weights_einsum_cls", "attn_weights_value_einsum_cls"):
        if getattr(module, name) is not None:
            return f"it has {name}"
    return None


Observe = Callable[[Array, int, int], None]


def compacted(
    part: Part,
    module: Any,
    method: Callable[..., Array],
    attention: Callable[..., Array],
    observe: Observe,
    *args: Any,
    **kwargs: Any,
) -> Array:
    """`method(*args, **kwargs)`, with a compact residual.

    Args:
      part: what the call is one of.
      module: one of its layers, bound.
      method: the `__call__` of Flax's layer for it.
      attention: what computes the core of attention.
      observe: is told what was compacted, and what plain Flax and this cache, in bytes.
      *args: the arguments of the call.
      **kwargs: likewise.
    """
    if part is ATTENTION:
        attend = _observed_attention(attention, observe)
        with hooks.replaced(module, attention_fn=attend):
            return method(*args, **kwargs)
    compact_call: Any = norms.compact if part is NORM else stochastic.compact
    out: Array = compact_call(module, method, *args, **kwargs)
    x = jnp.asarray(args[0] if args else kwargs["x" if part is NORM else "inputs"])
    if jnp.issubdtype(x.dtype, jnp.floating):
        if part is NORM:
            observe(x, x.nbytes, _bytes_of_norm(module, *args, **kwargs))
        elif (after := _bytes_of_dropout(module, x, *args[1:], **kwargs)) is not None:
            observe(x, x.size, after)
    return out


def _observed_attention(
    attention: Callable[..., Array], observe: Observe
) -> Callable[..., Array]:
    plain = nn.dot_product_attention

    # Flax gives a function what its signature has names for.
    @functools.wraps(plain)
    def attend(query: Array, *args: Any, **kwargs: Any) -> Array:
        before, after = (
            functions.kept_bytes(each, query, *args, arguments=True, **kwargs)
            for each in (plain, attention)
        )
        observe(query, before, after)
        return attention(query, *args, **kwargs)

    return attend


def _bytes_of_norm(module: Any, *args: Any, **kwargs: Any) -> int:
    layer = next(layer for layer in norms.LAYERS if isinstance(module, layer))
    alone = {"axis_name": None, "axis_index_groups": None, "parent": None}
    fields = calls.fields_of(module, layer) | alone
    twin: Any = getattr(norms, layer.__name__)(**fields)

    def run(variables: Any, *args: Any, **kwargs: Any) -> Any:
        return twin.apply(variables, *args, mutable=["batch_stats"], **kwargs)[0]

    with calls.as_product():  # it is no call of the model's
        return functions.kept_bytes(run, module.variables, *args, **kwargs)


def _bytes_of_dropout(
    module: nn.Dropout,
    x: Array,
    deterministic: bool | None = None,
    rng: Any = None,
    **_: Any,
) -> int | None:
    del rng
    still = nn.merge_param("deterministic", module.deterministic, deterministic)
    if module.rate == 0.0 or still or module.rate == 1.0:
        return None
    dims = tuple(module.broadcast_dims)
    drop = functools.partial(compact.dropout, rate=module.rate, broadcast_dims=dims)
    return functions.kept_bytes(drop, x, key=jax.eval_shape(jax.random.key, 0))
