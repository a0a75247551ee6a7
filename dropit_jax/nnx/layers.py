"""`flax.nnx` layers that cache their input compressed.

Each is a thin subclass of Flax's layer of the same name, with two more attributes:
`dropit`, what to keep of the input (`None`: the plain Flax layer), and `dropit_rngs`,
the stream of keys for policies that need them. Parameters, arguments and code are
Flax's. Streams are forked from the stream `"dropit"` of the `rngs` that a layer is
made with.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dropit_jax import hooks, sharing
from dropit_jax.nnx import subclasses
from dropit_jax.policy import DropIT, check_policy
from dropit_jax.products import operations, rule
from dropit_jax.products.operand import Axes

# The layers that hold the product in a field, and what takes its place.
_HOOKED: tuple[tuple[type[nnx.Module], str, Callable[..., Array]], ...] = (
    (nnx.Linear, "dot_general", operations.dot_general),
    (nnx.LinearGeneral, "dot_general", operations.dot_general),
    (nnx.Einsum, "einsum_op", operations.einsum),
    (nnx.Conv, "conv_general_dilated", operations.conv_general_dilated),
)


class _Caching(nnx.Module):
    """The fields and the call that our layers add to Flax's."""

    dropit: DropIT | None
    dropit_rngs: nnx.RngStream | None

    def __init__(
        self, *args: Any, dropit: DropIT | None = None, rngs: nnx.Rngs, **kwargs: Any
    ):
        flax_init: Any = super().__init__
        flax_init(*args, rngs=rngs, **kwargs)
        self.dropit = dropit
        self.dropit_rngs = new_stream(dropit, rngs)

    def __call__(
        self, inputs: Float[Array, "..."], *args: Any, **kwargs: Any
    ) -> Float[Array, "..."]:
        """The call of Flax's layer."""
        method: Any = super().__call__
        if self.dropit is None:
            return method(inputs, *args, **kwargs)
        key = _key(self, inputs)
        for layer, hook, operation in _HOOKED:
            if isinstance(self, layer):
                caching = functools.partial(operation, dropit=self.dropit, key=key)
                other = _with_operation(self, hook, caching)
                return method.__func__(other, inputs, *args, **kwargs)
        return _conv_transpose(self, key, inputs)


class Linear(_Caching, nnx.Linear):
    """`flax.nnx.Linear` that caches its input compressed."""


class LinearGeneral(_Caching, nnx.LinearGeneral):
    """`flax.nnx.LinearGeneral` that caches its input compressed.

    The axes that are summed over are the channels.
    """


class Einsum(_Caching, nnx.Einsum):
    """`flax.nnx.Einsum` that caches its input compressed.

    The axes that are summed over with the kernel are the channels.
    """


class Conv(_Caching, nnx.Conv):
    """`flax.nnx.Conv` that caches its input compressed."""


class ConvTranspose(_Caching, nnx.ConvTranspose):
    """`flax.nnx.ConvTranspose` that caches its input compressed."""


class MultiHeadAttention(nnx.MultiHeadAttention):
    """`flax.nnx.MultiHeadAttention` whose four projections cache compressed.

    Query, key and value that are projected from the same input cache it once.
    """

    def __init__(
        self, *args: Any, dropit: DropIT | None = None, rngs: nnx.Rngs, **kwargs: Any
    ):
        super().__init__(*args, rngs=rngs, **kwargs)
        keys = new_stream(dropit, rngs)
        for layer in (self.query, self.key, self.value, self.out):
            convert(layer, dropit, keys)


LAYERS: tuple[type[_Caching], ...] = (
    Linear,
    LinearGeneral,
    Einsum,
    Conv,
    ConvTranspose,
)
FLAX_LAYERS: tuple[type[nnx.Module], ...] = tuple(ours.__bases__[-1] for ours in LAYERS)


def convert(layer: Any, dropit: DropIT | None, keys: nnx.RngStream | None) -> None:
    """Gives a layer a policy, in place.

    Args:
      layer: one of `FLAX_LAYERS`.
      dropit: what to keep of its input.
      keys: for a policy that needs some, shaped as `stacked_axes(layer)`.
    """
    if not isinstance(layer, _Caching):
        layer.__class__ = subclasses.with_ours(type(layer), LAYERS)
    layer.dropit = dropit
    needed = dropit is not None and dropit.needs_key
    # Beside arrays, where nothing but its absence stood.
    layer.dropit_rngs = nnx.data(keys) if needed else None


def stacked_axes(layer: Any) -> tuple[int, ...]:
    """The sizes of the axes that `nnx.vmap` put among those of a layer's kernel.

    Args:
      layer: one of `FLAX_LAYERS`.
    """
    own, stacked = list(_kernel_shape(layer)), []
    for size in layer.kernel.shape:
        if size in own:
            own.remove(size)
        else:
            stacked.append(size)
    return tuple(stacked)


def _kernel_shape(layer: Any) -> tuple[int, ...]:
    """The shape of the kernel of one layer, in some order."""
    if isinstance(layer, nnx.LinearGeneral):
        batch = tuple(layer.batch_axis.values())
        return (*batch, *layer.in_features, *layer.out_features)
    if isinstance(layer, nnx.Einsum):
        return tuple(layer.kernel_shape)
    if isinstance(layer, nnx.Conv):
        groups = layer.feature_group_count
        features = layer.in_features // groups, layer.out_features
        return (*layer.kernel_size, *features)
    features = layer.in_features, layer.out_features
    if isinstance(layer, nnx.ConvTranspose):
        return (*layer.kernel_size, *features)
    return features


def new_stream(dropit: DropIT | None, rngs: nnx.Rngs | None) -> nnx.RngStream | None:
    """The keys of a policy that needs them.

    Raises:
      TypeError: it is no policy.
      ValueError: it needs keys, and there is no stream for them.
    """
    if dropit is None:
        return None
    check_policy(dropit)
    if not dropit.needs_key:
        return None
    try:
        return rngs.dropit.fork()  # type: ignore[union-attr]
    except AttributeError:
        raise ValueError(
            f"{dropit} needs PRNG keys: give rngs=nnx.Rngs(dropit=seed), or such a "
            "stream among others."
        ) from None


def _key(layer: Any, inputs: Any) -> Array | None:
    """A key, where one is needed.

    Layers with one stream that read the same inputs get the same key, so that they can
    share what is cached of them.
    """
    stream = layer.dropit_rngs
    if stream is None:
        return None
    return sharing.once(stream, (inputs, stream), "a layer's key")


def _with_operation(layer: Any, hook: str, operation: Callable[..., Array]) -> Any:
    """The layer with a caching operation in its hook.

    The operation that the layer would have used itself, be it the user's own, is what
    computes the product.
    """
    fields: dict[str, Any] = {}
    own = getattr(layer, hook)
    if getattr(layer, f"{hook}_cls", None) is not None:
        own, fields = getattr(layer, f"{hook}_cls")(), {f"{hook}_cls": None}
    if own is not None:
        operation = functools.partial(operation, operation=own)
    promote = _promoting_once(layer.promote_dtype)
    fields |= {hook: operation, "promote_dtype": promote}
    return hooks.changed(layer, **fields)


def _promoting_once(promote: Callable[..., Any]) -> Callable[..., Any]:
    """`promote_dtype` that gives layers which read the same inputs the same cast."""

    def promoted(arrays: tuple[Any, ...], **kwargs: Any) -> tuple[Any, ...]:
        cast, *rest = promote(arrays, **kwargs)
        return hooks.cast_once(arrays[0], cast, promote), *rest

    return promoted


def _conv_transpose(layer: Any, key: Array | None, inputs: Any) -> Array:
    """A layer without a hook, as one product of its inputs and its kernel."""
    offset = () if layer.bias is None else (layer.bias[...],)
    kernel, mask = layer.kernel[...], layer.mask
    if mask is not None and mask.shape == kernel.shape:
        # Not in the product, which keeps no arrays but its operands.
        kernel, mask = kernel * mask, None

    def product(inputs: Array, kernel: Array, *bias: Array) -> Array:
        used: dict[str, Any] = {"kernel": nnx.Param(kernel), "mask": mask}
        if bias:
            used["bias"] = nnx.Param(bias[0])
        return nnx.ConvTranspose.__call__(hooks.changed(layer, **used), inputs)

    promote = _promoting_once(layer.promote_dtype)
    flat, batch = hooks.as_batch(jnp.asarray(inputs), len(layer.kernel_size))
    bias = offset[0] if offset else None
    flat, *_ = promote((flat, kernel, bias), dtype=layer.dtype)
    out = rule.cached_product(
        product,
        flat,
        kernel,
        offset,
        dropit=layer.dropit,
        axes=Axes(tuple(range(flat.ndim))),
        key=key,
    )
    return hooks.unbatch(out, batch)
