"""`flax.nnx` layers that store their input compressed for the kernel's gradient.

Each is a subclass of Flax's layer of the same name, with the same parameters, arguments
and code, and two more attributes: `dropit`, the policy for the input (`None`: the plain
Flax layer), and `dropit_rngs`, the stream of keys for a policy that needs keys. The
stream is forked from the stream `"dropit"` of the layer's argument `rngs`. In
`MultiHeadAttention` the four projections have the attributes, and share one stream.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dropit_jax.nnx import subclasses
from dropit_jax.policy import DropIT, check_policy
from dropit_jax.products import operations, rule
from dropit_jax.products.operand import Axes, flatten_batch, unflatten_batch

# The layers that have a field for their product, the field, and the caching product.
_WITH_FIELD: tuple[tuple[type[nnx.Module], str, Callable[..., Array]], ...] = (
    (nnx.Linear, "dot_general", operations.dot_general),
    (nnx.LinearGeneral, "dot_general", operations.dot_general),
    (nnx.Einsum, "einsum_op", operations.einsum),
    (nnx.Conv, "conv_general_dilated", operations.conv_general_dilated),
)


class _Caching(nnx.Module):
    """The attributes and the call that this library's layers add to Flax's."""

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
        """Returns the output of Flax's layer, and stores the inputs compressed."""
        method: Any = super().__call__
        if self.dropit is None:
            return method(inputs, *args, **kwargs)
        key = None if self.dropit_rngs is None else self.dropit_rngs()
        for layer, field, product in _WITH_FIELD:
            if isinstance(self, layer):
                caching = functools.partial(product, dropit=self.dropit, key=key)
                other = _with_product(self, field, caching)
                return method.__func__(other, inputs, *args, **kwargs)
        return _conv_transpose(self, key, inputs, *args, **kwargs)


class Linear(_Caching, nnx.Linear):
    """`flax.nnx.Linear` that stores its input compressed."""


class LinearGeneral(_Caching, nnx.LinearGeneral):
    """`flax.nnx.LinearGeneral` that stores its input compressed.

    The contracted axes are the channels.
    """


class Einsum(_Caching, nnx.Einsum):
    """`flax.nnx.Einsum` that stores its input compressed.

    The axes contracted with the kernel are the channels.
    """


class Conv(_Caching, nnx.Conv):
    """`flax.nnx.Conv` that stores its input compressed."""


class ConvTranspose(_Caching, nnx.ConvTranspose):
    """`flax.nnx.ConvTranspose` that stores its input compressed."""


class MultiHeadAttention(nnx.MultiHeadAttention):
    """`flax.nnx.MultiHeadAttention` that stores its projections' inputs compressed.

    Query, key and value of one input have equal residuals, of which XLA stores one
    under `jax.jit`.
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
    """Sets the policy of a layer, in place; gives a Flax layer this library's class.

    Args:
      layer: a layer of one of the classes in `FLAX_LAYERS`.
      dropit: the policy; `None`: the layer computes as Flax's.
      keys: the stream of keys, of shape `stacked_axes(layer)`; ignored if the policy
        needs no keys.
    """
    if not isinstance(layer, _Caching):
        layer.__class__ = subclasses.with_ours(type(layer), LAYERS)
    layer.dropit = dropit
    needed = dropit is not None and dropit.needs_key
    # `nnx.data` declares a pytree in an attribute that was `None` or missing.
    layer.dropit_rngs = nnx.data(keys) if needed else None


def stacked_axes(layer: Any) -> tuple[int, ...]:
    """Returns the sizes of the axes that `nnx.vmap` added to a layer's kernel.

    For `Linear(3, 5)` stacked four times, with a kernel of shape (4, 3, 5): `(4,)`.

    Args:
      layer: a layer of one of the classes in `FLAX_LAYERS`.
    """
    own, stacked = list(_kernel_shape(layer)), []
    for size in layer.kernel.shape:
        if size in own:
            own.remove(size)
        else:
            stacked.append(size)
    return tuple(stacked)


def _kernel_shape(layer: Any) -> tuple[int, ...]:
    """Returns the sizes of the axes of an unstacked layer's kernel, in any order."""
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
    """Returns a new stream of keys for a policy; `None` if the policy needs no keys.

    Raises:
      TypeError: `dropit` is not a policy.
      ValueError: the policy needs keys, and `rngs` has no stream for them.
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


def _with_fields(layer: Any, **fields: Any) -> Any:
    """Returns a copy of a layer with other values in some fields.

    The copy shares the parameters. The layer itself does not change, since another
    thread may use it.
    """
    other = object.__new__(type(layer))
    vars(other).update(vars(layer) | fields)
    return other


def _with_product(layer: Any, field: str, caching: Callable[..., Array]) -> Any:
    """Returns a copy of a layer with a caching product in a field.

    The layer's own product, Flax's or the user's, still computes the values.

    Args:
      layer: the layer.
      field: the field, such as "dot_general".
      caching: the caching product, called with the own product as `operation`.
    """
    fields: dict[str, Any] = {}
    own = getattr(layer, field)
    if getattr(layer, f"{field}_cls", None) is not None:
        own, fields = getattr(layer, f"{field}_cls")(), {f"{field}_cls": None}
    if own is not None:
        caching = functools.partial(caching, operation=own)
    return _with_fields(layer, **fields | {field: caching})


def _conv_transpose(layer: Any, key: Array | None, inputs: Any) -> Array:
    """Returns the output of a `ConvTranspose`, computed as one product."""
    offset = () if layer.bias is None else (layer.bias[...],)
    kernel, mask = layer.kernel[...], layer.mask
    if mask is not None and mask.shape == kernel.shape:
        # A product must not close over an array, for which it would have no gradient.
        kernel, mask = kernel * mask, None

    def product(inputs: Array, kernel: Array, *bias: Array) -> Array:
        used: dict[str, Any] = {"kernel": nnx.Param(kernel), "mask": mask}
        if bias:
            used["bias"] = nnx.Param(bias[0])
        return nnx.ConvTranspose.__call__(_with_fields(layer, **used), inputs)

    flat, batch = flatten_batch(jnp.asarray(inputs), len(layer.kernel_size))
    bias = offset[0] if offset else None
    flat, *_ = layer.promote_dtype((flat, kernel, bias), dtype=layer.dtype)
    out = rule.cached_product(
        product,
        flat,
        kernel,
        offset,
        dropit=layer.dropit,
        axes=Axes(tuple(range(flat.ndim))),
        key=key,
    )
    return unflatten_batch(out, batch)
