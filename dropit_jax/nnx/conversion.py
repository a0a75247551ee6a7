"""Compact residuals in models of others: the layers of any built `flax.nnx` model."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from dropit_jax import layer_presets, matching
from dropit_jax import nn as compact
from dropit_jax.layer_presets import LayerPreset
from dropit_jax.nnx import layers, norms, stochastic, subclasses
from dropit_jax.policy import DropIT

# What takes the place of Flax's norms and its dropout, and of the function that its
# attention calls.
_TWINS: tuple[type[Any], ...] = (*norms.LAYERS, stochastic.Dropout)
_FLAX_TWINS = tuple(twin.__bases__[-1] for twin in _TWINS)
# One object: functions are compared by identity where JAX keeps what it has traced.
_ATTENTION = functools.partial(compact.dot_product_attention, bits=8)
_FLAX_ATTENTION = nnx.dot_product_attention


@dataclasses.dataclass(frozen=True)
class Change:
    """A change that `apply` made to a layer.

    Attributes:
      path: the layer's, its names joined by "/".
      kind: the name of its class.
      before: what it cached: by which policy, or of a layer that has none, in words
        ("8 bits", "1 bit", "recomputed"). `None`: what Flax does.
      after: what it caches, likewise.
    """

    path: str
    kind: str
    before: DropIT | str | None
    after: DropIT | str | None


def apply(
    model: nnx.Module,
    dropit: DropIT | LayerPreset | str | None,
    skip_first: Callable[[Any], Any] | None = None,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    rngs: nnx.Rngs | None = None,
) -> list[Change]:
    """Makes the layers of a built model cache less, in place.

    All `Linear`, `LinearGeneral`, `Einsum`, `Conv` and `ConvTranspose` layers become
    those of `dropit_jax.nnx`, wherever they are in the model; their parameters stay as
    they are. Of `nnx.MultiHeadAttention` these are the projections. A subclass of such
    a layer becomes a subclass of both; what it computes itself, past the product of
    Flax's layer, it computes as before. Layers with a policy of their own are left
    alone.

    With a preset, so do the norms (`eight_bit`) and `Dropout` (`one_bit`), and
    `nnx.MultiHeadAttention` attends by `dropit_jax.nn.dot_product_attention`
    (`eight_bit`), unless it has a function of the user's own. The activation functions
    and the pooling that a model's code calls cannot be reached: call those of
    `dropit_jax.nn` in it.

    Args:
      model: a model, or a layer.
      dropit: what the layers keep of their inputs; or a preset or its name, for all
        that is said above. `None`, and the preset `"baseline"`, take back what was
        done: layers with a policy lose it, the others become Flax's.
      skip_first: a call of the model, such as `lambda model: model(images)`. It is
        traced, to find the layer that comes first of those that have a policy; that one
        gets none, for its input is the data, which is there anyway (paper §3.4).
        `None`: all do.
      only: a glob, or several: the paths of the layers to change, such as
        `"blocks/*/mlp"`; `*` matches "/" too. `None`: all.
      exclude: the paths of layers to leave alone.
      rngs: for policies that need keys: where their stream is forked from. Of layers
        stacked by `nnx.vmap` each gets keys of its own.

    Returns:
      What was changed, in the order of the model's attributes.

    Raises:
      TypeError: an argument is of the wrong type.
      ValueError: a pattern matches no layer, the call in `skip_first` comes to none,
        the policy needs keys and there is no stream of them, there is no such preset,
        or it has blocks recomputed, which takes `nnx.remat` in the model's code.
        Nothing is changed then.
    """
    preset = _as_preset(dropit)
    if not isinstance(model, nnx.Pytree):
        raise TypeError(f"apply takes a model of flax.nnx, got {model!r}.")
    if not (skip_first is None or callable(skip_first)):
        raise TypeError(f"skip_first takes a call of the model, got {skip_first!r}.")
    meant = matching.matching(skip_first is not None, only, exclude)
    everything = list(_layers(model, (), set()))
    first = None if skip_first is None else _first_layer(model, everything, skip_first)
    takes_back = preset == LayerPreset(preset.name)
    found = [
        (path, layer)
        for path, layer in everything
        if takes_back or _meant(layer, preset) is not None
    ]
    meant.check([path for path, _ in found], [] if first is None else [first])
    streams = _streams(preset, rngs)
    changes = []
    for path, layer in found:
        before, after = _residual(layer), _meant(layer, preset)
        if (before is None) == (after is None) or not meant.selects(path, first):
            continue
        kind = type(layer).__name__
        _convert(layer, after, streams, path)
        changes.append(Change(path, kind, before, after))
    return changes


def _as_preset(dropit: DropIT | LayerPreset | str | None) -> LayerPreset:
    if dropit is None:
        return LayerPreset("baseline")
    if isinstance(dropit, DropIT):
        return LayerPreset("policy", dropit, dropit)
    preset = layer_presets.layer_preset(dropit) if isinstance(dropit, str) else dropit
    if not isinstance(preset, LayerPreset):
        raise TypeError(
            f"apply takes a DropIT policy, a preset or None, got {dropit!r}."
        )
    if preset.remat != "none":
        raise ValueError(
            f"apply cannot have blocks recomputed, as remat={preset.remat!r} says: use "
            "flax.nnx.remat in the model's code, and a preset without."
        )
    return preset


def _meant(layer: Any, preset: LayerPreset) -> DropIT | str | None:
    """The policy or form in which a preset has a layer cache; `None`: as Flax does."""
    if isinstance(layer, nnx.MultiHeadAttention):
        return "recomputed" if preset.eight_bit else None
    if isinstance(layer, nnx.Dropout):
        return "1 bit" if preset.one_bit else None
    if isinstance(layer, _FLAX_TWINS):
        return "8 bits" if preset.eight_bit else None
    is_conv = isinstance(layer, nnx.Conv | nnx.ConvTranspose)
    return preset.conv if is_conv else preset.dropit


def _residual(layer: Any) -> DropIT | str | None:
    """The policy or form in which a layer caches; `None`: as Flax does."""
    if isinstance(layer, nnx.MultiHeadAttention):
        return None if layer.attention_fn is _FLAX_ATTENTION else "recomputed"
    if isinstance(layer, _TWINS):
        return "1 bit" if isinstance(layer, nnx.Dropout) else "8 bits"
    return getattr(layer, "dropit", None)


def _is_free(layer: Any) -> bool:
    """Whether what a layer caches is for `apply` to change."""
    if isinstance(layer, nnx.MultiHeadAttention):
        return layer.attention_fn in (_ATTENTION, _FLAX_ATTENTION)
    if isinstance(layer, _TWINS):
        return subclasses.without_ours(type(layer), _TWINS) is not None
    return isinstance(layer, (*layers.FLAX_LAYERS, *_FLAX_TWINS))


# Streams of keys: one for all layers that are not stacked, and one for those that are
# by the module that they are in and the sizes of the axes that they are stacked along.
_Streams = dict[tuple[str, tuple[int, ...]], nnx.RngStream]
_UNSTACKED = ("", ())


def _convert(layer: Any, residual: Any, streams: _Streams, path: str) -> None:
    """Makes a layer cache what it is to."""
    if isinstance(layer, nnx.MultiHeadAttention):
        layer.attention_fn = _FLAX_ATTENTION if residual is None else _ATTENTION
    elif isinstance(layer, _FLAX_TWINS):
        swap = subclasses.without_ours if residual is None else subclasses.with_ours
        cls: Any = swap(type(layer), _TWINS)
        layer.__class__ = cls
    else:
        layers.convert(layer, residual, _stream_of(layer, streams, path))


def _streams(preset: LayerPreset, rngs: nnx.Rngs | None) -> _Streams:
    """One stream of keys for all layers, where a policy needs them."""
    for policy in (preset.dropit, preset.conv):
        if (stream := layers.new_stream(policy, rngs)) is not None:
            return {_UNSTACKED: stream}
    return {}


def _stream_of(layer: Any, streams: _Streams, path: str) -> nnx.RngStream | None:
    """The stream for a layer; for stacked ones a key each, as `nnx.vmap` makes them.

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
    """The paths and layers in a model, in the order of its attributes."""
    if id(node) in visited:
        return
    visited.add(id(node))
    if _is_free(node):
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
    model: nnx.Module, everything: list[tuple[str, Any]], call: Callable[[Any], Any]
) -> str:
    """The path of the layer that a call comes to first, of those with a policy."""
    found = [e for e in everything if isinstance(e[1], layers.FLAX_LAYERS)]
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
    """A subclass that takes note of its calls."""

    def noting_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        called.append(path)
        return cls.__call__(self, *args, **kwargs)

    return type(cls.__name__, (cls,), {"__call__": noting_call})
