"""`flax.nnx` layers that cache their input compressed, and any model made of them.

Each is a thin subclass of Flax's layer of the same name, with two more attributes:
`dropit`, what to keep of the input (`None`: the plain Flax layer), and `dropit_rngs`,
the stream of keys for policies that need them. Parameters, arguments and code are
Flax's. Streams are forked from the stream `"dropit"` of the `rngs` that a layer is
made with.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dropit_jax import hooks, matching, ops, products, sharing
from dropit_jax.policy import DropIT, check_policy


@dataclasses.dataclass(frozen=True)
class Change:
    """What `apply` did to a layer.

    Attributes:
      path: the layer's, its names joined by "/".
      kind: the name of its class.
      before: the policy that it had.
      after: the policy that it has.
    """

    path: str
    kind: str
    before: DropIT | None
    after: DropIT | None


# What `apply` converts, with the field that holds the product and what takes its place.
_HOOKED: tuple[tuple[type[nnx.Module], str, Callable[..., Array]], ...] = (
    (nnx.Linear, "dot_general", ops.dot_general),
    (nnx.LinearGeneral, "dot_general", ops.dot_general),
    (nnx.Einsum, "einsum_op", ops.einsum),
    (nnx.Conv, "conv_general_dilated", ops.conv_general_dilated),
)


class _Caching(nnx.Module):
    """What the layers here add to Flax's."""

    dropit: DropIT | None
    dropit_rngs: nnx.RngStream | None

    def __init__(
        self, *args: Any, dropit: DropIT | None = None, rngs: nnx.Rngs, **kwargs: Any
    ):
        flax_init: Any = super().__init__
        flax_init(*args, rngs=rngs, **kwargs)
        self.dropit = dropit
        self.dropit_rngs = _stream(dropit, rngs)

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
                with _replaced(self, hook, caching):
                    return method(inputs, *args, **kwargs)
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
        stream = _stream(dropit, rngs)
        for layer in (self.query, self.key, self.value, self.out):
            _convert(layer, dropit, stream)


# Flax's layers and ours for each.
_OURS: dict[type[nnx.Module], type[_Caching]] = {
    nnx.Linear: Linear,
    nnx.LinearGeneral: LinearGeneral,
    nnx.Einsum: Einsum,
    nnx.Conv: Conv,
    nnx.ConvTranspose: ConvTranspose,
}


def apply(
    model: nnx.Module,
    dropit: DropIT | None,
    skip_first: Callable[[Any], Any] | None = None,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    rngs: nnx.Rngs | None = None,
) -> list[Change]:
    """Makes the layers of a built model use DropIT, in place.

    All `Linear`, `LinearGeneral`, `Einsum`, `Conv` and `ConvTranspose` layers become
    those of this module, wherever they are in the model; their parameters stay as they
    are. Of `nnx.MultiHeadAttention` these are the projections. A subclass of such a
    layer becomes a subclass of both; what it computes itself, past the product of
    Flax's layer, it computes as before. Layers with a policy of their own are left
    alone.

    Args:
      model: a model, or a layer.
      dropit: what the layers keep of their inputs. `None` takes back what was done:
        layers with a policy lose it.
      skip_first: a call of the model, such as `lambda model: model(images)`. It is
        traced, to find the layer that comes first; that one is left alone, for its
        input is the data, which is there anyway (paper §3.4). `None`: none is.
      only: a glob, or several: the paths of the layers to change, such as
        `"blocks/*/mlp"`; `*` matches "/" too. `None`: all.
      exclude: the paths of layers to leave alone.
      rngs: for policies that need keys: where their stream is forked from.

    Returns:
      What was changed, in the order of the model's attributes.

    Raises:
      TypeError: an argument is of the wrong type.
      ValueError: a pattern matches no layer, the call in `skip_first` comes to none, or
        the policy needs keys and there is no stream of them. Nothing is changed then.
    """
    if not (dropit is None or isinstance(dropit, DropIT)):
        raise TypeError(f"apply takes a DropIT policy or None, got {dropit!r}.")
    if not isinstance(model, nnx.Pytree):
        raise TypeError(f"apply takes a model of flax.nnx, got {model!r}.")
    if not (skip_first is None or callable(skip_first)):
        raise TypeError(f"skip_first takes a call of the model, got {skip_first!r}.")
    meant = matching.matching(skip_first is not None, only, exclude)
    layers = list(_layers(model, (), set()))
    first = None if skip_first is None else _first_layer(model, layers, skip_first)
    meant.check([path for path, _ in layers], [] if first is None else [first])
    stream = _stream(dropit, rngs)
    changes = []
    for path, layer in layers:
        before = getattr(layer, "dropit", None)
        if not meant.selects(path, first) or (before is None) == (dropit is None):
            continue
        kind = type(layer).__name__
        _convert(layer, dropit, stream)
        changes.append(Change(path, kind, before, dropit))
    return changes


def _layers(
    node: Any, path: tuple[str, ...], visited: set[int]
) -> Iterator[tuple[str, Any]]:
    """The paths and layers in a model, in the order of its attributes."""
    if id(node) in visited:
        return
    visited.add(id(node))
    if isinstance(node, tuple(_OURS)):
        yield "/".join(path), node
    children: Any = ()
    if isinstance(node, nnx.Pytree):
        children = vars(node).items()
    elif isinstance(node, Mapping):
        children = node.items()
    elif isinstance(node, list | tuple):
        children = enumerate(node)
    for name, child in children:
        yield from _layers(child, (*path, str(name)), visited)


def _first_layer(
    model: nnx.Module, layers: list[tuple[str, Any]], call: Callable[[Any], Any]
) -> str:
    """The path of the layer that a call of a model comes to first."""
    called: list[str] = []
    # A copy has its attributes in another order, so that a layer with two paths may
    # have the other one there: the copy's classes know the paths of the model.
    classes = [type(layer) for _, layer in layers]
    try:
        for path, layer in layers:
            layer.__class__ = _noting_class(type(layer), path, called)
        graph, state = nnx.split(model)
    finally:
        for (_, layer), cls in zip(layers, classes, strict=True):
            layer.__class__ = cls

    def traced(state: Any) -> None:
        call(nnx.merge(graph, state))

    jax.eval_shape(traced, state)
    if not called:
        raise ValueError("The call in skip_first comes to none of the model's layers.")
    return called[0]


def _noting_class(cls: type[Any], path: str, called: list[str]) -> type[Any]:
    """A subclass that takes note of its calls."""

    def noting_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        called.append(path)
        return cls.__call__(self, *args, **kwargs)

    return type(cls.__name__, (cls,), {"__call__": noting_call})


def _convert(layer: Any, dropit: DropIT | None, stream: nnx.RngStream | None) -> None:
    if not isinstance(layer, _Caching):
        cls: type[nnx.Module] = type(layer)
        layer.__class__ = _caching_class(cls)
    layer.dropit = dropit
    # Beside arrays, where nothing but its absence stood.
    layer.dropit_rngs = stream if stream is None else nnx.data(stream)


@functools.cache  # one class for all layers of a class: classes are compared by JAX
def _caching_class(cls: type[nnx.Module]) -> type[_Caching]:
    if cls in _OURS:
        return _OURS[cls]
    # The class itself comes first: it calls ours where it would have called Flax's.
    ours = next(ours for theirs, ours in _OURS.items() if issubclass(cls, theirs))
    return type(cls.__name__, (cls, ours), {"__module__": cls.__module__})


def _stream(dropit: DropIT | None, rngs: nnx.Rngs | None) -> nnx.RngStream | None:
    """The keys of a policy that needs them."""
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


def _replaced(
    layer: Any, hook: str, operation: Callable[..., Array]
) -> contextlib.AbstractContextManager[None]:
    """Puts a caching operation into a hook of a layer, for one call.

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
    return hooks.replaced(layer, **fields)


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
        with hooks.replaced(layer, **used):
            return nnx.ConvTranspose.__call__(layer, inputs)

    promote = _promoting_once(layer.promote_dtype)
    flat, batch = hooks.as_batch(jnp.asarray(inputs), len(layer.kernel_size))
    bias = offset[0] if offset else None
    flat, *_ = promote((flat, kernel, bias), dtype=layer.dtype)
    out = products.cached_product(
        product,
        flat,
        kernel,
        offset,
        dropit=layer.dropit,
        layout=products.Layout(tuple(range(flat.ndim))),
        key=key,
    )
    return hooks.unbatch(out, batch)
