"""Makes the classes of existing Flax layers with this library's code.

This library's layers are subclasses of Flax's with the same attributes. So an existing
layer is converted by assigning its `__class__`.
"""

import copyreg
from typing import Any

# The classes made here, by (the user's class, this library's class). All layers of a
# class get one class, since JAX compares classes.
_made: dict[tuple[type[Any], type[Any]], type[Any]] = {}


def with_ours(cls: type[Any], ours: tuple[type[Any], ...]) -> type[Any]:
    """Returns a subclass that runs this library's code in place of Flax's.

    For Flax's own class it is this library's layer; for a user's subclass of it, a new
    class with the user's class and this library's layer as bases.

    Args:
      cls: a class of Flax, or a subclass of one.
      ours: this library's layers, each with the class of Flax as its last base.
    """
    layer = next(layer for layer in ours if issubclass(cls, layer.__bases__[-1]))
    if cls is layer.__bases__[-1]:
        return layer
    if (cls, layer) not in _made:
        # The user's class is first, so that its `super()` is this library's layer.
        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
        made = _metaclass(type(cls))(cls.__name__, (cls, layer), names)
        _made[cls, layer] = made
    return _made[cls, layer]


_metaclasses: dict[Any, Any] = {}


def _metaclass(base: type[type]) -> type[type]:
    """Returns a metaclass whose classes are pickled as their two bases."""
    made: type[type] | None = _metaclasses.get(base)
    if made is None:
        made = _metaclasses[base] = type(base.__name__, (base,), {})
        copyreg.pickle(made, _reduced)
    return made


def _reduced(made: type[Any]) -> Any:
    """Returns the call of `with_ours` that makes a class again, for pickle.

    Pickling by name would find the user's class, which has the same name.
    """
    for (cls, layer), known in _made.items():
        if made is known:
            return with_ours, (cls, (layer,))
    return made.__qualname__  # a user's subclass of a class made here
