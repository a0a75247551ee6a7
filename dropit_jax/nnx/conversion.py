"""Applies a DropIT policy to the layers of an existing `flax.nnx` model."""

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
      path: the names on the way to the layer, joined by "/".
      kind: the name of the layer's class before the change.
      before: the policy before the change; `None`: none.
      after: the policy after the change; `None`: none.
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
    """Applies a policy to the layers of an existing model, in place.

    All `Linear`, `LinearGeneral`, `Einsum`, `Conv` and `ConvTranspose` layers of
    `flax.nnx` become layers of `dropit_jax.nnx`, also as projections of attention;
    their parameters do not change. A layer of a user's subclass gets a new class, with
    the user's class and this library's layer as bases. The user's code runs as before;
    where it calls the `__call__` of Flax, the input is stored compressed. A subclass
    that never calls it stores nothing compressed, although its change is in the result.
    Layers with their own policy keep it.

    Args:
      model: a model, or a layer.
      dropit: the policy. `None`: removes the policies of layers.
      skip_first: a call of the model, such as `lambda model: model(images)`. It is
        traced to find the first layer, which gets no policy: its input is the data,
        which is in memory anyway (paper, §3.4). `None`: all layers get the policy.
      only: one or several globs for the paths of the layers to change, such as
        `"blocks/*/mlp"`; `*` matches "/" too. A layer in several places has the path of
        the first one only. `None`: all layers.
      exclude: globs for the paths of layers that do not change.
      rngs: the streams of keys, of which "dropit" is forked if the policy needs keys.
        Layers stacked by `nnx.vmap` get different keys.

    Returns:
      The changes, in the order of the model's attributes.

    Raises:
      TypeError: an argument is of the wrong type.
      ValueError: a glob matches no layer, the call in `skip_first` calls no layer, or
        the policy needs keys and `rngs` has no stream for them. The model is unchanged.
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


# Streams of keys: one for all layers that are not stacked, and one for each pair of
# (path of the parent module, sizes of the stacked axes).
_Streams = dict[tuple[str, tuple[int, ...]], nnx.RngStream]
_UNSTACKED = ("", ())


def _streams(dropit: DropIT | None, rngs: nnx.Rngs | None) -> _Streams:
    """Returns the stream of keys for unstacked layers; `{}` if no keys are needed.

    Raises:
      ValueError: the policy needs keys, and `rngs` has no stream for them.
    """
    stream = layers.new_stream(dropit, rngs)
    return {} if stream is None else {_UNSTACKED: stream}


def _stream_of(layer: Any, streams: _Streams, path: str) -> nnx.RngStream | None:
    """Returns the stream of keys for a layer; `None` if the policy needs no keys.

    The stream of stacked layers has a key for each layer: `nnx.scan` and `nnx.vmap`
    split a layer's state, keys included, along the stacked axis. They refuse a stream
    that a split module shares with another module that is not split.

    Args:
      layer: the layer.
      streams: the streams so far; one may be added.
      path: the path of the layer.
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
    """Yields the (path, layer) pairs of a model, in the order of its attributes.

    A layer in several places comes once, with the path of the first one.
    """
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
    """Returns the path of the first layer that a call of the model calls.

    Raises:
      ValueError: the call calls no layer of its argument, a copy of the model.
    """
    called: list[str] = []
    # The call runs on a copy of the model, whose attributes have another order. So the
    # classes record the paths: a layer with two paths could have the other one there.
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
        raise ValueError("The call in skip_first calls none of the model's layers.")
    return called[0]


def _noting_class(cls: type[Any], path: str, called: list[str]) -> type[Any]:
    """Returns a subclass whose calls append the path to `called`."""

    def noting_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        called.append(path)
        return cls.__call__(self, *args, **kwargs)

    return type(cls.__name__, (cls,), {"__call__": noting_call})
