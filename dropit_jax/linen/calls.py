"""One call of a Flax layer with a product, with what it caches compressed.

The layer's own code runs. Where Flax has a hook for the product, a caching operation is
put into it for the time of the call; where it has none, the whole layer is the product.
"""

import contextlib
import contextvars
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import flax.linen as nn
import jax.numpy as jnp
from flax.core import meta
from jaxtyping import Array

from dropit_jax import compat, hooks, sharing
from dropit_jax.linen import parameters
from dropit_jax.policy import DropIT, check_policy
from dropit_jax.products import operations, rule
from dropit_jax.products.operand import Axes

# The Flax layers whose product can be replaced, with the field that replaces it.
_HOOKED: tuple[tuple[type[nn.Module], str, Callable[..., Array]], ...] = (
    (nn.Dense, "dot_general", operations.dot_general),
    (nn.DenseGeneral, "dot_general", operations.dot_general),
    (nn.Conv, "conv_general_dilated", operations.conv_general_dilated),
)
# Those whose product cannot.
_WHOLE: tuple[type[nn.Module], ...] = (nn.Einsum, nn.ConvLocal, nn.ConvTranspose)

LAYERS: tuple[type[nn.Module], ...] = (*(layer for layer, *_ in _HOOKED), *_WHOLE)
CONVOLUTIONS = (nn.Conv, nn.ConvLocal, nn.ConvTranspose)

# The code of their calls, as Flax's interceptors name it. A subclass with another
# `__call__` is another layer, until it calls Flax's.
FLAX_CALLS = {inspect.unwrap(layer.__call__) for layer in LAYERS}

# From the code of our layers' calls to that of Flax's, which runs as a part of it.
_flax_calls: dict[Any, Any] = {}

Call = TypeVar("Call", bound=Callable[..., Any])


def runs(layer: type[nn.Module]) -> Callable[[Call], Call]:
    """Returns a decorator of a `__call__` that runs Flax's of a layer as a part of it.

    Args:
      layer: Flax's, whose call `compat.without_flax_wrapper` gives.
    """

    def decorated(call: Call) -> Call:
        _flax_calls[call] = inspect.unwrap(layer.__call__)
        return call

    return decorated


def flax_call(context: Any) -> Callable[..., Any]:
    """Returns the code of the call that an interceptor is told of.

    For a layer of ours it is Flax's, unless a class stands between the two.

    Args:
      context: `flax.linen.module.InterceptorContext`.
    """
    call = compat.flax_function(context)
    if call not in _flax_calls:
        return call
    codes = [
        inspect.unwrap(vars(cls)["__call__"])
        for cls in type(context.module).__mro__
        if "__call__" in vars(cls)
    ]
    inherited = codes[codes.index(call) + 1]
    return inherited if inherited is _flax_calls[call] else call


# Set while a layer is run as the product of a caching operation.
_is_product = contextvars.ContextVar("is_product", default=False)


def is_product() -> bool:
    """Whether a layer is being run as the product of a caching operation."""
    return _is_product.get()


@contextlib.contextmanager
def as_product() -> Iterator[None]:
    """Runs a layer in a way that is no call of the model's."""
    token = _is_product.set(True)
    try:
        yield
    finally:
        _is_product.reset(token)


def is_layer_call(context: Any) -> bool:
    """Whether what an interceptor is told of is the call of one of `LAYERS`.

    It is not where a layer is run as the product of a caching operation, and where its
    hook caches already.

    Args:
      context: `flax.linen.module.InterceptorContext`.
    """
    module = context.module
    if is_product() or flax_call(context) not in FLAX_CALLS:
        return False
    names = (hook for layer, hook, _ in _HOOKED if isinstance(module, layer))
    return not any(_caches(getattr(module, hook)) for hook in names)


def has_policy(module: nn.Module) -> bool:
    """Whether a layer has a policy of its own, or the attention that it belongs to."""
    owners = [module]
    if isinstance(module.parent, nn.MultiHeadDotProductAttention):
        owners.append(module.parent)
    return any(isinstance(getattr(o, "dropit", None), DropIT) for o in owners)


def stateful_product(module: nn.Module) -> str | None:
    """The field of a layer that makes its product a module, such as that of fp8.

    Such a product changes its variables, which it cannot as a part of a caching one.
    """
    for layer, hook, _ in _HOOKED:
        if not isinstance(module, layer):
            continue
        made = getattr(module, f"{hook}_cls")
        made = made.func if isinstance(made, functools.partial) else made
        if isinstance(made, type) and issubclass(made, nn.Module):
            return f"{hook}_cls"
    return None


def _caches(operation: Any) -> bool:
    return isinstance(operation, functools.partial) and operation.func in (
        operations.dot_general,
        operations.conv_general_dilated,
    )


def cached(
    module: nn.Module,
    method: Callable[..., Array],
    dropit: DropIT | None,
    inputs: Any,
    *args: Any,
    **kwargs: Any,
) -> Array:
    """`method(inputs, *args, **kwargs)`, with the inputs cached compressed.

    Args:
      module: one of `LAYERS`, bound.
      method: the `__call__` of Flax's layer for it.
      dropit: what to keep of the inputs; `None`: the plain Flax layer.
      inputs: the layer's.
      *args: the other arguments of the call: of `nn.Einsum` alone, its equation.
      **kwargs: likewise.
    """
    if args:
        (kwargs["einsum_str"],) = args
    if dropit is None:
        return method(inputs, **kwargs)
    check_policy(dropit)
    if (field := stateful_product(module)) is not None:
        raise TypeError(
            f"{type(module).__name__} with {field}={getattr(module, field)!r}, a "
            "module with a state of its own, cannot cache its input compressed: leave "
            "the layer without dropit."
        )
    key = _key(module, dropit, inputs)
    for layer, hook, operation in _HOOKED:
        if isinstance(module, layer):
            caching = functools.partial(operation, dropit=dropit, key=key)
            with _caching(module, hook, caching), parameters.read_by_shape(module):
                return method(inputs, **kwargs)
    if not module.has_variable("params", "kernel"):  # it is about to be initialised
        return method(inputs, **kwargs)
    return _whole(module, dropit, key, inputs, **kwargs)


@contextlib.contextmanager
def cached_children(module: nn.Module, dropit: DropIT | None) -> Iterator[None]:
    """Caches the inputs of the layers that a module calls itself, compressed."""
    if dropit is None:
        yield
        return

    def interceptor(
        method: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: Any,
    ) -> Any:
        if context.module.parent is module and is_layer_call(context):
            return cached(context.module, method, dropit, *args, **kwargs)
        return method(*args, **kwargs)

    with nn.intercept_methods(interceptor):
        yield


def _key(module: nn.Module, dropit: DropIT, inputs: Any) -> Array | None:
    """A key of the RNG stream `"dropit"`, where one is needed and given.

    Layers that read the same inputs get the same key, so that they can share what is
    cached of them.
    """
    if not (dropit.needs_key and module.has_rng("dropit")):
        return None
    stream = compat.flax_stream(module.scope, "dropit")
    return sharing.once(
        lambda: module.make_rng("dropit"), (inputs, stream), "a layer's key"
    )


def _caching(
    module: Any, hook: str, operation: Callable[..., Array]
) -> contextlib.AbstractContextManager[None]:
    """Puts a caching operation into a hook of a module, for one call.

    The operation that the module would have used itself, be it the user's own, is what
    computes the product.
    """
    cls = getattr(module, f"{hook}_cls")
    own = getattr(module, hook) if cls is None else cls()
    if own is not None:
        operation = functools.partial(operation, operation=own)
    fields = {hook: operation, f"{hook}_cls": None}
    promote = _promoting_once(module.promote_dtype)
    return hooks.replaced(module, **fields, promote_dtype=promote)


def _promoting_once(promote: Callable[..., Any]) -> Callable[..., Any]:
    """`promote_dtype` that gives layers which read the same inputs the same cast."""

    def promoted(inputs: Any, *params: Any, **kwargs: Any) -> list[Any]:
        cast, *rest = promote(inputs, *params, **kwargs)
        return [hooks.cast_once(inputs, cast, promote), *rest]

    return promoted


def _whole(
    module: Any, dropit: DropIT, key: Array | None, inputs: Any, **kwargs: Any
) -> Array:
    """A layer without a hook, as one product of its inputs and its kernel."""
    layer = next(layer for layer in _WHOLE if isinstance(module, layer))
    fields = fields_of(module, layer)
    params = meta.unbox(module.variables["params"])
    kernel, mask = params["kernel"], fields.get("mask")
    if mask is not None and mask.shape == kernel.shape:
        # Not in the product, which keeps no arrays but its operands.
        kernel, fields["mask"] = kernel * mask, None
    plain = layer(**fields, parent=None)
    offset = (params["bias"],) if module.use_bias else ()

    def product(inputs: Array, kernel: Array, *bias: Array) -> Array:
        used = {"kernel": kernel, **({"bias": bias[0]} if bias else {})}
        with as_product():
            out: Any = plain.apply({"params": used}, inputs, **kwargs)
        return out

    inputs = jnp.asarray(inputs)
    if module.promote_dtype is nn.dtypes.promote_dtype:
        promote = _promoting_once(module.promote_dtype)
        inputs, *_ = promote(inputs, kernel, *offset, dtype=module.dtype)
    cache = functools.partial(
        rule.cached_product, product, dropit=dropit, key=key, offset=offset
    )
    if isinstance(module, nn.Einsum):
        equation = nn.merge_param(
            "einsum_str", module.einsum_str, kwargs.get("einsum_str")
        )
        axes = operations.einsum_axes(equation, inputs, kernel)
        return cache(inputs, kernel, axes=axes)
    size = module.kernel_size
    flat, batch = hooks.as_batch(inputs, 1 if isinstance(size, int) else len(size))
    axes = Axes(tuple(range(flat.ndim)))
    return hooks.unbatch(cache(flat, kernel, axes=axes), batch)


def fields_of(module: Any, layer: type[nn.Module]) -> dict[str, Any]:
    """The fields of a base class with a module's values, for its constructor."""
    return {
        field.name: getattr(module, field.name)
        for field in dataclasses.fields(layer)
        if field.init and field.name not in ("parent", "name")
    }
