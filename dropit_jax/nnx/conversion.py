"""A DropIT policy for the layers of any built `flax.nnx` model."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from dropit_jax.nnx import layers
from dropit_jax.policy import DropIT
from dropit_jax.products import matching


@dataclasses.dataclass(frozen=True)
class Change:
    """A change that `apply` made to a layer.

    Attributes:
      path: the layer's; its names joined by "/".
      kind: the name of its class.
      before: the policy that it had; `None`: none.
      after: the policy that it has now.
    """

    path: str
    kind: str
    before: DropIT | None
    after: DropIT | None


def apply(
    model: nnx.Module,
    dropit: DropIT | None,
    skip_first: Callable[[Any], Any] | None = None,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    rngs: nnx.Rngs | None = None,
) -> list[Change]:
    """Applies a policy to the layers of a built model, in place.

    All `Linear`, `LinearGeneral`, `Einsum`, `Conv` and `ConvTranspose` layers of
    `flax.nnx` become those of `dropit_jax.nnx`, the projections of attention among
    them; their parameters stay as they are. A subclass of such a layer becomes a
    subclass of both, and its own code runs as before, around the product of Flax's
    layer. Layers with a policy of their own keep it.

    Args:
      model: a model, or a layer.
      dropit: the policy. `None`: layers that have a policy lose it.
      skip_first: a call of the model, such as `lambda model: model(images)`. It is
        traced to find the first layer, which gets no policy: its input is the data,
        which are there anyway (paper, §3.4). `None`: all layers get the policy.
      only: a glob, or several: the paths of the layers to change, such as
        `"blocks/*/mlp"`; `*` matches "/" too. `None`: all.
      exclude: the paths of layers to leave alone.
      rngs: for policies that need keys: where their stream is forked from. Of layers
        stacked by `nnx.vmap` each gets keys of its own.

    Returns:
      The changes, in the order of the model's attributes.

    Raises:
      TypeError: an argument is of the wrong type.
      ValueError: a pattern matches no layer, the call in `skip_first` comes to none, or
        the policy needs keys and there is no stream of them. Nothing is changed then.
    """
    if not (dropit is None or isinstance(dropit, DropIT)):
        raise TypeError(
            f"apply takes a DropIT policy or None, got {dropit!r}; presets are for "
            "dropit_jax.nnx.drop."
        )
    if not isinstance(model, nnx.Pytree):
        raise TypeError(f"apply takes a model of flax.nnx, got {model!r}.")
    if not (skip_first is None or callable(skip_first)):
        raise TypeError(f"skip_first takes a call of the model, got {skip_first!r}.")
    meant = matching.matching(skip_first is not None, only, exclude)
    found = list(_layers(model, (), set()))
    first = None if skip_first is None else _first_layer(model, found, skip_first)
    meant.check([path for path, _ in found], [] if first is None else [first])
    streams = _streams(dropit, rngs)
    changes = []
    for path, layer in found:
        before = getattr(layer, "dropit", None)
        if (before is None) == (dropit is None) or not meant.selects(path, first):
            continue
        kind = type(layer).__name__
        layers.convert(layer, dropit, _stream_of(layer, streams, path))
        changes.append(Change(path, kind, before, dropit))
    return changes


# Streams of keys: one for all layers that are not stacked, and one for those that are
# by the module that they are in and the sizes of the axes that they are stacked along.
_Streams = dict[tuple[str, tuple[int, ...]], nnx.RngStream]
_UNSTACKED = ("", ())


def _streams(dropit: DropIT | None, rngs: nnx.Rngs | None) -> _Streams:
    """Returns one stream of keys for all layers, if the policy needs them."""
    stream = layers.new_stream(dropit, rngs)
    return {} if stream is None else {_UNSTACKED: stream}


def _stream_of(layer: Any, streams: _Streams, path: str) -> nnx.RngStream | None:
    """Returns the stream for a layer; for stacked layers a key each, as by `nnx.vmap`.

    `nnx.scan` and `nnx.vmap` take a layer's state apart along the axis that it is
    stacked along, and its keys with it. They refuse a stream that is in two modules of
    which one is taken apart and the other is not.
    """
    if not streams:
        return None
    axes = layers.stacked_axes(layer)
    place = (path.rpartition("/")[0], axes) if axes else _UNSTACKED
    if place not in streams:
        streams[place] = streams[_UNSTACKED].split(axes)
    return streams[place]


def _layers(
    node: Any, path: tuple[str, ...], visited: set[int]
) -> Iterator[tuple[str, Any]]:
    """Yields the paths and layers of a model, in the order of its attributes."""
    if id(node) in visited:
        return
    visited.add(id(node))
    if isinstance(node, layers.FLAX_LAYERS):
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
    model: nnx.Module, found: list[tuple[str, Any]], call: Callable[[Any], Any]
) -> str:
    """Returns the path of the layer that a call comes to first."""
    called: list[str] = []
    # A copy has its attributes in another order, so that a layer with two paths may
    # have the other one there: the copy's classes know the paths of the model.
    before = [type(layer) for _, layer in found]
    try:
        for path, layer in found:
            layer.__class__ = _noting_class(type(layer), path, called)
        graph, state = nnx.split(model)
    finally:
        for (_, layer), cls in zip(found, before, strict=True):
            layer.__class__ = cls

    def traced(state: Any) -> None:
        call(nnx.merge(graph, state))

    jax.eval_shape(traced, state)
    if not called:
        raise ValueError("The call in skip_first comes to none of the model's layers.")
    return called[0]


def _noting_class(cls: type[Any], path: str, called: list[str]) -> type[Any]:
    """Returns a subclass that records its calls."""

    def noting_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        called.append(path)
        return cls.__call__(self, *args, **kwargs)

    return type(cls.__name__, (cls,), {"__call__": noting_call})
