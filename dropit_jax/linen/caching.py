"""Calls a `flax.linen` layer so that it stores its input compressed.

The layer's own code runs. If the layer has a field for its product, the field holds a
caching product during the call. If not, the whole layer is the product.
"""

import contextlib
import contextvars
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.core import meta
from jaxtyping import Array

from dropit_jax import compat
from dropit_jax.policy import DropIT, check_policy
from dropit_jax.products import operations, rule
from dropit_jax.products.operand import Axes, flatten_batch, unflatten_batch

# The layers that have a field for their product, the field, and the caching product.
_WITH_FIELD: tuple[tuple[type[nn.Module], str, Callable[..., Array]], ...] = (
    (nn.Dense, "dot_general", operations.dot_general),
    (nn.DenseGeneral, "dot_general", operations.dot_general),
    (nn.Conv, "conv_general_dilated", operations.conv_general_dilated),
)
_WITHOUT: tuple[type[nn.Module], ...] = (nn.Einsum, nn.ConvLocal, nn.ConvTranspose)
LAYERS = (*(layer for layer, *_ in _WITH_FIELD), *_WITHOUT)

_FLAX_CALLS = {inspect.unwrap(layer.__call__) for layer in LAYERS}
# The `__call__`s of this library's layers, which run the `__call__` of the next class.
_our_calls: set[Any] = set()

# Set while a layer runs as the product of a caching operation.
_is_product = contextvars.ContextVar("is_product", default=False)


def runs_next_call(call: Callable[..., Any]) -> Callable[..., Any]:
    """Records the `__call__` of a layer of this library, and returns it unchanged.

    A recorded `__call__` runs the `__call__` of the next class, which `is_layer_call`
    checks in its place.
    """
    _our_calls.add(call)
    return call


def is_layer_call(context: Any) -> bool:
    """Returns whether an intercepted method is the `__call__` of one of `LAYERS`.

    The method must be Flax's, or this library's around Flax's. A user's override does
    not count, but Flax's `__call__` does if the override calls it. No call counts while
    a layer runs as a product, or if the layer's product caches already.

    Args:
      context: a `flax.linen.module.InterceptorContext`.
    """
    module, call = context.module, compat.flax_function(context)
    if _is_product.get() or not isinstance(module, LAYERS):
        return False
    classes = type(module).__mro__
    calls = [vars(each).get("__call__") for each in classes]
    functions = [inspect.unwrap(each) for each in calls if each is not None]
    if call not in functions:
        return False
    after = functions[functions.index(call) :]
    if next(each for each in after if each not in _our_calls) not in _FLAX_CALLS:
        return False
    fields = (field for layer, field, _ in _WITH_FIELD if isinstance(module, layer))
    return not any(_caches(getattr(module, field)) for field in fields)


def has_policy(module: nn.Module) -> bool:
    """Returns whether a layer, or the attention around it, has a policy of its own."""
    owners = [module]
    if isinstance(module.parent, nn.MultiHeadDotProductAttention):
        owners.append(module.parent)
    return any(isinstance(getattr(o, "dropit", None), DropIT) for o in owners)


def stateful_product(module: nn.Module) -> str | None:
    """Returns the field that makes a layer's product a module, or `None`.

    For a layer with an fp8 product: "dot_general_cls". A module updates variables,
    which is impossible inside a caching product.
    """
    for layer, field, _ in _WITH_FIELD:
        if not isinstance(module, layer):
            continue
        made = getattr(module, f"{field}_cls")
        made = made.func if isinstance(made, functools.partial) else made
        if isinstance(made, type) and issubclass(made, nn.Module):
            return f"{field}_cls"
    return None


def _caches(product: Any) -> bool:
    caching = (operations.dot_general, operations.conv_general_dilated)
    return isinstance(product, functools.partial) and product.func in caching


def cached(
    module: nn.Module,
    method: Callable[..., Array],
    dropit: DropIT | None,
    inputs: Any,
    *args: Any,
    **kwargs: Any,
) -> Array:
    """Returns `method(inputs, *args, **kwargs)`, and stores the inputs compressed.

    Args:
      module: a bound module of one of the classes in `LAYERS`.
      method: the `__call__` of the Flax layer, bound to the module.
      dropit: the policy for the inputs; `None`: the plain Flax layer.
      inputs: the inputs of the layer.
      *args: the equation of an `nn.Einsum`, if given by position.
      **kwargs: the other arguments of the call.

    Raises:
      TypeError: `dropit` is not a policy, or the product of the layer is a module.
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
    needs_key = dropit.needs_key and module.has_rng("dropit")
    key = module.make_rng("dropit") if needs_key else None
    for layer, field, product in _WITH_FIELD:
        if isinstance(module, layer):
            caching = functools.partial(product, dropit=dropit, key=key)
            with _with_product(module, field, caching):
                return method(inputs, **kwargs)
    if not module.has_variable("params", "kernel"):  # the layer is being initialised
        return method(inputs, **kwargs)
    return _as_one_product(module, dropit, key, inputs, **kwargs)


@contextlib.contextmanager
def cached_children(module: nn.Module, dropit: DropIT | None) -> Iterator[None]:
    """Applies a policy to the layers that are children of a module, in the context."""
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


@contextlib.contextmanager
def _with_product(
    module: Any, field: str, caching: Callable[..., Array]
) -> Iterator[None]:
    """Puts a caching product into a field of a bound module, in the context.

    The module's own product, Flax's or the user's, still computes the values.

    Args:
      module: the module.
      field: the field, such as "dot_general"; `{field}_cls` is `None` meanwhile.
      caching: the caching product, called with the own product as `operation`.
    """
    cls = getattr(module, f"{field}_cls")
    own = getattr(module, field) if cls is None else cls()
    if own is not None:
        caching = functools.partial(caching, operation=own)
    fields = {field: caching, f"{field}_cls": None}
    before = {name: getattr(module, name) for name in fields}
    # Bound modules refuse assignment, since a call must not change them. Here the old
    # values are back when the call ends.
    for name, value in fields.items():
        object.__setattr__(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(module, name, value)


def _as_one_product(
    module: Any, dropit: DropIT, key: Array | None, inputs: Any, **kwargs: Any
) -> Array:
    """Returns the output of a layer, computed as one product of inputs and kernel."""
    layer = next(layer for layer in _WITHOUT if isinstance(module, layer))
    fields = {
        field.name: getattr(module, field.name)
        for field in dataclasses.fields(layer)
        if field.init and field.name not in ("parent", "name")
    }
    params = meta.unbox(module.variables["params"])
    kernel, mask = params["kernel"], fields.get("mask")
    if mask is not None and mask.shape == kernel.shape:
        # A product must not close over an array, for which it would have no gradient.
        kernel, fields["mask"] = kernel * mask, None
    plain = layer(**fields, parent=None)
    bias = (params["bias"],) if module.use_bias else ()

    def product(inputs: Array, kernel: Array, *bias: Array) -> Array:
        used = {"kernel": kernel, **({"bias": bias[0]} if bias else {})}
        token = _is_product.set(True)
        try:
            out: Any = plain.apply({"params": used}, inputs, **kwargs)
        finally:
            _is_product.reset(token)
        return out

    inputs = jnp.asarray(inputs)
    if module.promote_dtype is nn.dtypes.promote_dtype:
        inputs, *_ = module.promote_dtype(inputs, kernel, *bias, dtype=module.dtype)
    cache = functools.partial(
        rule.cached_product, product, dropit=dropit, key=key, offset=bias
    )
    if isinstance(module, nn.Einsum):
        equation = nn.merge_param(
            "einsum_str", module.einsum_str, kwargs.get("einsum_str")
        )
        axes = operations.einsum_axes(equation, inputs, kernel)
        return cache(inputs, kernel, axes=axes)
    size = module.kernel_size
    flat, batch = flatten_batch(inputs, 1 if isinstance(size, int) else len(size))
    axes = Axes(tuple(range(flat.ndim)))
    return unflatten_batch(cache(flat, kernel, axes=axes), batch)
