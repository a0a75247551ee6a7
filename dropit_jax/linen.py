"""`flax.linen` layers that cache their input compressed.

Each is a thin subclass of Flax's layer of the same name: the same arguments, the same
parameters, the same code, with the product replaced through the hook that Flax has for
it. A checkpoint of the Flax layer loads unchanged.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import flax.linen as nn
from jaxtyping import Array, Float

from dropit_jax import ops
from dropit_jax.policy import DropIT


class Dense(nn.Dense):
    """`flax.linen.Dense` that caches its input compressed.

    Attributes:
      dropit: what to keep of the input; `None`: the plain Flax layer. All other
        attributes are those of `flax.linen.Dense`.
    """

    dropit: DropIT | None = None

    @nn.compact
    def __call__(self, inputs: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Applies the layer along the last axis."""
        with _caching(self, "dot_general", ops.dot_general, self.dropit):
            return super().__call__(inputs)


class Conv(nn.Conv):
    """`flax.linen.Conv` that caches its input compressed.

    Attributes:
      dropit: what to keep of the input; `None`: the plain Flax layer. All other
        attributes are those of `flax.linen.Conv`.
    """

    dropit: DropIT | None = None

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "*batch_spatial in"]
    ) -> Float[Array, "*batch_spatial_out out"]:
        """Applies the convolution over the spatial axes, channels last."""
        with _caching(
            self, "conv_general_dilated", ops.conv_general_dilated, self.dropit
        ):
            return super().__call__(inputs)


@contextlib.contextmanager
def _caching(
    module: nn.Module,
    hook: str,
    caching_operation: Callable[..., Array],
    dropit: DropIT | None,
) -> Iterator[None]:
    """Puts a caching operation into a hook field of a module, for one call.

    The operation that the module would have used itself, be it the user's own, is what
    computes the product.
    """
    if dropit is None:
        yield
        return
    fields = {
        hook: getattr(module, hook),
        f"{hook}_cls": getattr(module, f"{hook}_cls"),
    }
    cls = fields[f"{hook}_cls"]
    own = fields[hook] if cls is None else cls()
    operation = functools.partial(caching_operation, dropit=dropit)
    if own is not None:
        operation = functools.partial(operation, operation=own)
    # A bound module refuses assignment, rightly: it must not change from call to call.
    # These fields are put back before anyone can see them.
    object.__setattr__(module, hook, operation)
    object.__setattr__(module, f"{hook}_cls", None)
    try:
        yield
    finally:
        for name, value in fields.items():
            object.__setattr__(module, name, value)
