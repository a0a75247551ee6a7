"""Our classes in place of Flax's, for layers that are made already.

Ours are subclasses of Flax's with the same attributes: for one to take the place of the
other, the class of a layer is all that changes.
"""

from typing import Any

# The classes made here, by what they are made of: somebody's class, and ours. There is
# one for all layers of a class: classes are compared by JAX.
_made: dict[tuple[type[Any], type[Any]], type[Any]] = {}


def with_ours(cls: type[Any], ours: tuple[type[Any], ...]) -> type[Any]:
    """A class of layers, with our code where it would have called Flax's.

    Args:
      cls: a class of Flax's, or a subclass of one.
      ours: our classes, each with Flax's as its last base.
    """
    layer = next(layer for layer in ours if issubclass(cls, layer.__bases__[-1]))
    if cls is layer.__bases__[-1]:
        return layer
    if (cls, layer) not in _made:
        # The class itself comes first: it calls ours where it would have called Flax's.
        made = type(cls.__name__, (cls, layer), {"__module__": cls.__module__})
        _made[cls, layer] = made
    return _made[cls, layer]


def without_ours(cls: type[Any], ours: tuple[type[Any], ...]) -> type[Any] | None:
    """The inverse; `None` for a class that somebody made of ours."""
    if cls in ours:
        return cls.__bases__[-1]
    return next((theirs for (theirs, _), made in _made.items() if made is cls), None)
