"""Parameters of a layer, read without a look at their initialisers.

In every `apply` Flax traces the initialiser of each parameter anew, only to compare its
shape with the parameter's: a good part of the time that a training step takes to
trace. The layers that are given here ask for a shape, and that is what is compared.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import numpy as np
from flax.core import meta


@contextlib.contextmanager
def read_by_shape(module: nn.Module) -> Iterator[None]:
    """Reads a module's parameters so, while it lasts.

    A parameter that is missing, or of another shape than asked for, is left to Flax,
    which makes it, or has an error for it.

    Args:
      module: bound; its initialisers are functions of a key and the shape that they
        give, and perhaps more: those of Flax's layers.
    """
    scope: Any = module.scope
    own = vars(scope)  # has one where modules share a scope and one calls another
    before = own.get("param")
    plain: Callable[..., Any] = scope.param

    def param(
        name: str, initialiser: Any, *args: Any, unbox: bool = True, **kwargs: Any
    ) -> Any:
        if unbox and args and scope.has_variable("params", name):
            value = meta.unbox(scope.get_variable("params", name))
            if np.shape(value) == tuple(args[0]):
                scope.reserve(name, "params")
                return value
        return plain(name, initialiser, *args, unbox=unbox, **kwargs)

    own["param"] = param
    try:
        yield
    finally:
        if before is None:
            del own["param"]
        else:
            own["param"] = before
