"""Our classes in place of Flax's, for layers that are made already.

Ours are subclasses of Flax's with the same attributes: for one to take the place of the
other, the class of a layer is all that changes.
"""

import copyreg
from typing import Any

# The classes made here, by what they are made of: somebody's class, and ours. There is
# one for all layers of a class: classes are compared by JAX.
_made: dict[tuple[type[Any], type[Any]], type[Any]] = {}


def with_ours(cls: type[Any], ours: tuple[type[Any], ...]) -> type[Any]:
    """Returns a class of layers that runs our code in place of Flax's.

    Args:
      cls: a class of Flax's, or a subclass of one.
      ours: our classes, each with Flax's as its last base.
    """
    layer = next(layer for layer in ours if issubclass(cls, layer.__bases__[-1]))
    if cls is layer.__bases__[-1]:
        return layer
    if (cls, layer) not in _made:
        # The class itself comes first: it calls ours where it would have called Flax's.
        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
        made = _metaclass(type(cls))(cls.__name__, (cls, layer), names)
        _made[cls, layer] = made
    return _made[cls, layer]


_metaclasses: dict[Any, Any] = {}


def _metaclass(base: type[type]) -> type[type]:
    """A metaclass whose classes are pickled as what they are made of."""
    made: type[type] | None = _metaclasses.get(base)
    if made is None:
        made = _metaclasses[base] = type(base.__name__, (base,), {})
        copyreg.pickle(made, _reduced)
    return made


def _reduced(made: type[Any]) -> Any:
    """How a class is pickled, which no module has under its name."""
    for (cls, layer), known in _made.items():
        if made is known:
            return with_ours, (cls, (layer,))
    return made.__qualname__  # a class that somebody made of one
