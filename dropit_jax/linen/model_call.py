"""One call of a model, as the calls of its modules see it.

What a layer is to do can depend on the call of the model that it is a part of: whether
it is the first there, and whether an earlier one reads the same input. Flax has no name
for such a call, and `nn.jit` none for the place of a module in it.
"""

import contextlib
import contextvars
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import flax.linen as nn
from flax.core import Scope
from jaxtyping import Array

from dropit_jax import compat


@dataclasses.dataclass
class ModelCall:
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


_call: contextvars.ContextVar[ModelCall | None]
_call = contextvars.ContextVar("call", default=None)

# The calls under way, by the identity of their root scopes.
_calls: dict[int, tuple[Callable[[], Scope | None], ModelCall]] = {}


def path(module: nn.Module) -> str:
    """The names of a module and of those around it, joined by "/"."""
    return "/".join(module.path)


@contextlib.contextmanager
def in_call(scope: Scope) -> Iterator[ModelCall]:
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


def _call_of(root: Scope) -> ModelCall:
    place = id(root)
    known, call = _calls.get(place, (lambda: None, ModelCall()))
    if known() is root:
        return call

    def forget(_: Any) -> None:
        _calls.pop(place, None)

    _calls[place] = (weakref.ref(root, forget), call := ModelCall())
    return call


class Decider(Protocol):
    """What decides about layers by their paths, such as an `Interception`.

    Attributes:
      firsts: the first layer of each module.
    """

    firsts: dict[str, str]


@functools.cache
def tell_paths_to_jit(decider: Callable[[], Decider]) -> None:
    """Lets `nn.jit` know modules of different paths apart while layers are replaced.

    A trace that it keeps holds what was decided for the path that it was made with.
    Outside of `intercept` the proxies do what they did.

    Args:
      decider: gives the innermost interception that there is, in a call of a model.
    """
    proxies = compat.flax_jit_proxies()
    plain = proxies.from_module

    def from_module(module: nn.Module) -> Any:
        proxy = plain(module)
        if (call := _call.get()) is None:
            return proxy
        innermost, name = decider(), path(module)
        place = (innermost, name, call.first is None)
        if call.first is None:  # a trace that is kept will not say
            call.first = innermost.firsts.get(name)
        return dataclasses.replace(proxy, hash_key=hash((proxy.hash_key, *place)))

    proxies.from_module = staticmethod(from_module)
