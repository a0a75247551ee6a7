"""DropIT in models of others: the layers of any `flax.linen` model, left as it is."""

import contextlib
import contextvars
import dataclasses
import functools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax
from flax.core import Scope
from flax.linen import transforms
from jaxtyping import Array

from dropit_jax import matching, products
from dropit_jax.linen import calls
from dropit_jax.matching import Matching
from dropit_jax.policy import DropIT


@dataclasses.dataclass(frozen=True)
class InterceptedLayer:
    """What DropIT does to a layer.

    Attributes:
      path: the layer's, its names joined by "/".
      kind: the name of its class.
      shape: of the input that it caches.
      dtype: of that input.
      bytes_before: what plain Flax caches of the input in one call, in bytes.
      bytes_after: what DropIT caches of it.
      shared_with: the path of an earlier layer that reads the same input and caches it
        for both; then this one's bytes are 0. `None` elsewhere.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    dtype: jax.typing.DTypeLike
    bytes_before: int
    bytes_after: int
    shared_with: str | None = None


@dataclasses.dataclass
class _Call:
    """One call of a model, from outside any module.

    Attributes:
      first: the path of the first layer that it came to.
      readers: which layer was the first to read an activation.
    """

    first: str | None = None
    readers: dict[Any, tuple[weakref.ref[Array], str]] = dataclasses.field(
        default_factory=dict
    )

    def first_reader(self, activation: Array, how: Any, path: str) -> str:
        """The layer that caches an activation in this way: this one, or an earlier."""
        place = (id(activation), how)
        known, reader = self.readers.get(place, (lambda: None, path))
        if known() is not activation:
            reader = path
            self.readers[place] = (weakref.ref(activation), path)
        return reader


class Interception:
    """What `intercept` does, and a report of it.

    `layers` lists the layers that use DropIT, in the order in which the model came to
    them, with what each caches in its last call (in a loop, one step of it); it grows
    while models are traced. Layers are told apart by their paths. As text it is a
    table.
    """

    def __init__(self, dropit: DropIT, meant: Matching):
        self._dropit = dropit
        self._matching = meant
        self._layers: dict[str, InterceptedLayer] = {}
        self._seen: dict[str, None] = {}  # paths, in order
        self._later: set[str] = set()  # of these, the ones not first in some call
        self.firsts: dict[str, str] = {}  # the first layer of each module

    @property
    def key(self) -> Any:
        """All that a trace depends on."""
        return self._dropit, self._matching

    @property
    def layers(self) -> list[InterceptedLayer]:
        """The layers that use DropIT."""
        return list(self._layers.values())

    @property
    def bytes_before(self) -> int:
        """What plain Flax caches of the inputs of these layers."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """What DropIT caches of them."""
        return sum(layer.bytes_after for layer in self.layers)

    def __str__(self) -> str:
        rows = [("layer", "kind", "input", "before", "after")]
        for layer in self.layers:
            size = f"{jax.numpy.dtype(layer.dtype).name}{list(layer.shape)}"
            after = f"{layer.bytes_after:,}"
            if layer.shared_with is not None:
                after = f"shared with {layer.shared_with}"
            before = f"{layer.bytes_before:,}"
            rows.append((layer.path or ".", layer.kind, size, before, after))
        total = (f"{self.bytes_before:,}", f"{self.bytes_after:,}")
        rows.append((f"{len(self.layers)} layers, bytes", "", "", *total))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = (
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))
            for row in rows
        )
        return "\n".join(line.rstrip() for line in lines)

    def selects(self, path: str, call: _Call) -> bool:
        """Whether a layer is to use DropIT."""
        return self._matching.selects(path, call.first)

    def note(self, path: str, call: _Call) -> None:
        """Takes note of a layer that might."""
        self._seen[path] = None
        if path != call.first:
            self._later.add(path)

    def run(
        self,
        module: nn.Module,
        method: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        call: _Call,
    ) -> Any:
        """The call of a layer, with DropIT."""
        path = _path(module)

        def observe(lhs: Array, layout: products.Layout, nbytes: int) -> None:
            reader = call.first_reader(lhs, (layout, self._dropit), path)
            before = math.prod(lhs.shape) * lhs.dtype.itemsize
            shared = reader != path
            self._layers[path] = InterceptedLayer(
                path,
                type(module).__name__,
                lhs.shape,
                lhs.dtype,
                bytes_before=0 if shared else before,
                bytes_after=0 if shared else nbytes,
                shared_with=reader if shared else None,
            )

        with products.observed(observe):
            return calls.cached(module, method, self._dropit, *args, **kwargs)

    def check(self) -> None:
        """Refuses globs that match no layer.

        Raises:
          ValueError: there are such globs. Where no layer was traced there is nothing
            to say: it may all have been compiled before.
        """
        if self._seen:
            self._matching.check(self._seen, self._seen.keys() - self._later)


# A part of the keys of JAX's caches: a function traced within `intercept` is not the
# same function outside of it.
_traced_within = jax.make_user_context(default_value=())

_interceptions: contextvars.ContextVar[tuple[Interception, ...]]
_interceptions = contextvars.ContextVar("interceptions", default=())

_call: contextvars.ContextVar[_Call | None]
_call = contextvars.ContextVar("call", default=None)

# The calls under way, by the identity of their root scopes.
_calls: dict[int, tuple[Callable[[], Scope | None], _Call]] = {}


def intercept(
    dropit: DropIT,
    skip_first: bool = True,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> AbstractContextManager[Interception]:
    """Makes the layers of any `flax.linen` model use DropIT while the context lasts.

    The model and its parameters stay as they are. All calls of Flax's own `Dense`,
    `DenseGeneral`, `Einsum`, `Conv`, `ConvLocal` and `ConvTranspose` are replaced, on
    their own, in a subclass or inside another module such as
    `MultiHeadDotProductAttention`. Layers with a policy of their own are left alone,
    and so are those whose product has a state, such as `Fp8DotGeneralOp`.
    Functions that `jax.jit` compiled outside are traced again. Of two contexts, one in
    the other, the inner one decides wherever it selects a layer.

    Args:
      dropit: what the layers keep of their inputs.
      skip_first: leaves the first layer alone that a call of a model comes to: its
        input is the data, which is there anyway (paper §3.4).
      only: a glob, or several: the paths of the layers to replace, such as
        `"encoder/*/Dense_0"`; `*` matches "/" too. `None`: all.
      exclude: the paths of layers to leave alone.

    Returns:
      A context manager that gives an `Interception`, which lists what was replaced.

    Raises:
      TypeError: `dropit` is not a policy, or a pattern not a string.
      ValueError: on leaving, a pattern matched none of the layers seen.
    """
    if not isinstance(dropit, DropIT):
        raise TypeError(f"intercept takes a DropIT policy, got {dropit!r}.")
    meant = matching.matching(skip_first, only, exclude)
    return _intercepting(Interception(dropit, meant))


@contextlib.contextmanager
def _intercepting(interception: Interception) -> Iterator[Interception]:
    _tell_paths_to_jit()
    outer = _interceptions.get()
    key = (*_traced_within.value, interception.key)

    def interceptor(
        method: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: Any,
    ) -> Any:
        module = context.module
        if calls.is_product() or module.scope is None:
            return method(*args, **kwargs)
        with _in_call(module.scope) as call:
            path = _path(module)
            if isinstance(module, calls.LAYERS) and call.first is None:
                call.first = path
            if not calls.is_layer_call(context):
                out = method(*args, **kwargs)
                if call.first is not None:
                    interception.firsts[path] = call.first
                return out
            inner = _interceptions.get()[len(outer) + 1 :]
            for each in (interception, *inner):  # who may not see it, if this runs it
                each.note(path, call)
            if (
                calls.has_policy(module)
                or calls.stateful_product(module) is not None
                or any(other.selects(path, call) for other in inner)
                or not interception.selects(path, call)
            ):
                return method(*args, **kwargs)
            return interception.run(module, method, args, kwargs, call)

    token = _interceptions.set((*outer, interception))
    try:
        with nn.intercept_methods(interceptor), _traced_within(key):
            yield interception
    finally:
        _interceptions.reset(token)
    interception.check()


def _call_of(root: Scope) -> _Call:
    place = id(root)
    known, call = _calls.get(place, (lambda: None, _Call()))
    if known() is root:
        return call

    def forget(_: Any) -> None:
        _calls.pop(place, None)

    _calls[place] = (weakref.ref(root, forget), call := _Call())
    return call


@functools.cache
def _tell_paths_to_jit() -> None:
    """Lets `nn.jit` know modules of different paths apart while layers are replaced.

    It keeps a trace for all modules that are alike, and a trace holds what was decided
    for the path that it was made with. Flax has no public hook for this; outside of
    `intercept` the private one does what it did.
    """
    proxies: Any = transforms._HashableProxy
    plain = proxies.from_module

    def from_module(module: nn.Module) -> Any:
        proxy = plain(module)
        if (call := _call.get()) is None:
            return proxy
        interception, path = _interceptions.get()[-1], _path(module)
        place = (interception, path, call.first is None)
        if call.first is None:  # a trace that is kept will not say
            call.first = interception.firsts.get(path)
        return dataclasses.replace(proxy, hash_key=hash((proxy.hash_key, *place)))

    proxies.from_module = staticmethod(from_module)


@contextlib.contextmanager
def _in_call(scope: Scope) -> Iterator[_Call]:
    """The call of a model that this is a part of; a new one if of none.

    Where the method that is applied is a function (`model.apply(..., method=f)`), no
    module's call is around those of the layers; but all have one root scope, which is
    made for each `init`, `apply` and `bind`. In a loop or another lifted transformation
    scopes have other roots, and there a module's call is around.
    """
    call = _call.get()
    if call is not None:
        yield call
        return
    token = _call.set(call := _call_of(scope.root))
    try:
        yield call
    finally:
        _call.reset(token)


def _path(module: nn.Module) -> str:
    return "/".join(module.path)
