"""Hooks of what others wrote, filled for one call or for some time."""

import contextlib
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxtyping import Array

from dropit_jax import sharing


@contextlib.contextmanager
def replaced(module: Any, **fields: Any) -> Iterator[None]:
    """Gives fields of a module other values, for one call of it."""
    before = {name: getattr(module, name) for name in fields}
    # Modules refuse assignment while they run, rightly: they must not change from call
    # to call. These fields are put back before anyone can see them.
    for name, value in fields.items():
        object.__setattr__(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(module, name, value)


def changed(module: Any, **fields: Any) -> Any:
    """A module of the same parameters, with other values in some fields.

    For modules that threads share: nothing of the module itself changes.
    """
    other = object.__new__(type(module))
    vars(other).update(vars(module) | fields)
    return other


def cast_once(inputs: Any, cast: Array, how: Any) -> Array:
    """The cast of some inputs, the same array for all layers that read them.

    Otherwise each would cache a tensor of its own.

    Args:
      inputs: what is cast.
      cast: what a layer cast them to.
      how: all else that this depends on.
    """
    return sharing.once(lambda: cast, (inputs,), ("cast", how, cast.dtype))


def as_batch(inputs: Array, spatial: int) -> tuple[Array, tuple[int, ...]]:
    """The inputs of a convolution with one axis for the batch, and what it was.

    As in Flax, all axes of the batch become one, and a single sample a batch of one.
    """
    batch = inputs.shape[: inputs.ndim - spatial - 1]
    if len(batch) == 1:
        return inputs, batch
    return inputs.reshape(-1, *inputs.shape[len(batch) :]), batch


def unbatch(out: Array, batch: tuple[int, ...]) -> Array:
    """The inverse of `as_batch`, for the outputs."""
    return out if len(batch) == 1 else out.reshape(*batch, *out.shape[1:])


class StandIns:
    """Puts objects in the place of others, in all threads, for some time.

    Attributes of modules become properties, which give the stand-in to some readers
    alone. Entries of a dictionary, such as the names in a file, have no such hook:
    there a stand-in is for everyone, and has to do for everyone what the other did.
    """

    def __init__(self, is_for: Callable[[str], bool]):
        """Nothing stands anywhere yet.

        Args:
          is_for: whether the code of a module, given by its name, is to find stand-ins
            in attributes, in this thread and now.
        """
        self._is_for = is_for
        self._lock = threading.RLock()
        self._users = 0
        self._modules: list[tuple[types.ModuleType, type, type]] = []
        self._entries: list[tuple[dict[Any, Any], Any, Any, Any]] = []

    @contextlib.contextmanager
    def in_modules(
        self, modules: Mapping[types.ModuleType, Mapping[str, Any]]
    ) -> Iterator[None]:
        """Puts stand-ins for attributes of modules, while it lasts, in any thread.

        Args:
          modules: each with its attributes' names, and what is to stand for them. The
            same every time.
        """
        with self._lock:
            self._users += 1
        try:
            with self._lock:
                if not self._modules:
                    for module, others in modules.items():
                        self._watch(module, others)
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._put_back()

    def in_dictionary(
        self, entries: dict[Any, Any], other: Callable[[Any], Any]
    ) -> None:
        """Puts stand-ins for entries, until nobody is in `in_modules` any more.

        Args:
          entries: the dictionary.
          other: what is to stand for a value, or the value itself.
        """
        with self._lock:
            if not self._users:
                return
            for name, value in list(entries.items()):
                if (stand_in := other(value)) is not value:
                    entries[name] = stand_in
                    self._entries.append((entries, name, value, stand_in))

    def _watch(self, module: types.ModuleType, others: Mapping[str, Any]) -> None:
        before = type(module)
        properties = {n: self._property(module, n, o) for n, o in others.items()}
        after = type(before.__name__, (before,), properties)
        module.__class__ = after
        self._modules.append((module, before, after))

    def _property(self, module: types.ModuleType, name: str, other: Any) -> property:
        own = vars(module)
        plain = own[name]

        def read(_: types.ModuleType) -> Any:
            value = own[name]
            # The frame that this was called from is that of who reads it.
            reader = sys._getframe(1).f_globals.get("__name__")
            return other if value is plain and self._is_for(str(reader)) else value

        def write(_: types.ModuleType, value: Any) -> None:
            own[name] = value

        return property(read, write)

    def _put_back(self) -> None:
        for module, before, after in self._modules:
            if type(module) is after:
                module.__class__ = before
        for entries, name, before_it, stand_in in self._entries:
            if entries.get(name) is stand_in:
                entries[name] = before_it
        self._modules, self._entries = [], []
