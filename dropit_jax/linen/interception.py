"""A DropIT policy for the layers of any `flax.linen` model, left as it is."""

import contextlib
import contextvars
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import Scope
from jaxtyping import Array

from dropit_jax.linen import caching
from dropit_jax.policy import DropIT
from dropit_jax.products import matching, rule
from dropit_jax.products.matching import Matching


@dataclasses.dataclass(frozen=True)
class InterceptedLayer:
    """A layer that a policy was applied to.

    Attributes:
      path: the layer's; its names joined by "/".
      kind: the name of its class.
      shape: of its input.
      dtype: of its input.
      bytes_before: the size of the input, which plain Flax caches in one call.
      bytes_after: the size of the residual.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    dtype: jax.typing.DTypeLike
    bytes_before: int
    bytes_after: int


class Interception:
    """The layers that `intercept` applied a policy to.

    As text it is a table of them.

    Attributes:
      dropit: the policy.
      layers: in the order in which the model came to them, each with its last call (in
        a loop, one step of it). The list grows while models are traced; layers are told
        apart by their paths.
    """

    def __init__(self, dropit: DropIT, meant: Matching):
        self.dropit = dropit
        self._matching = meant
        self._layers: dict[str, InterceptedLayer] = {}
        self._paths: dict[str, None] = {}  # of all layers, in order
        self._later: set[str] = set()  # of these, the ones not first in some call

    @property
    def key(self) -> Any:
        """Everything that a trace depends on."""
        return self.dropit, self._matching

    @property
    def layers(self) -> list[InterceptedLayer]:
        """The layers that the policy was applied to."""
        return list(self._layers.values())

    @property
    def bytes_before(self) -> int:
        """The bytes that plain Flax caches of the inputs of these layers."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """The bytes of the residuals of these layers."""
        return sum(layer.bytes_after for layer in self.layers)

    def __str__(self) -> str:
        rows = [("layer", "kind", "input", "before", "after")]
        for layer in self.layers:
            size = f"{jnp.dtype(layer.dtype).name}{list(layer.shape)}"
            sizes = f"{layer.bytes_before:,}", f"{layer.bytes_after:,}"
            rows.append((layer.path or ".", layer.kind, size, *sizes))
        total = f"{self.bytes_before:,}", f"{self.bytes_after:,}"
        rows.append((f"{len(self.layers)} layers, bytes", "", "", *total))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = (
            "  ".join(map(str.ljust, row, widths)).rstrip()  # one cell below the other
            for row in rows
        )
        return "\n".join(lines)

    def selects(self, path: str, first: str) -> bool:
        """Returns whether the policy is for the layer of a path.

        Args:
          path: the layer's.
          first: the path of the first layer of the model's call.
        """
        return self._matching.selects(path, first)

    def see(self, path: str, first: str) -> None:
        """Records a layer that the policy could be for; arguments as in `selects`."""
        self._paths[path] = None
        if path != first:
            self._later.add(path)

    def run(
        self,
        module: nn.Module,
        path: str,
        method: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Array:
        """Calls a layer with the policy applied, and records the layer."""

        def record(x: Array, nbytes: int) -> None:
            kind = type(module).__name__
            self._layers[path] = InterceptedLayer(
                path, kind, x.shape, x.dtype, x.size * x.dtype.itemsize, nbytes
            )

        with rule.observed(record):
            return caching.cached(module, method, self.dropit, *args, **kwargs)

    def check(self) -> None:
        """Checks that every pattern matched a layer, where there were any.

        Raises:
          ValueError: one did not.
        """
        if self._paths:
            self._matching.check(self._paths, self._paths.keys() - self._later)


# The interceptions around, the outermost first.
_interceptions: contextvars.ContextVar[tuple[Interception, ...]]
_interceptions = contextvars.ContextVar("interceptions", default=())

# A part of the key under which `jax.jit` keeps what it has traced.
_traced_within = jax.make_user_context(default_value=())


def intercept(
    dropit: DropIT,
    skip_first: bool = True,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> AbstractContextManager[Interception]:
    """Applies a policy to the layers of any linen model, while the context lasts.

    The layers are `Dense`, `DenseGeneral`, `Einsum`, `Conv`, `ConvLocal` and
    `ConvTranspose` of `flax.linen`, the projections of attention among them. Those with
    a policy of their own keep it, and those whose product is a module with a state, as
    in fp8, are left alone. Of nested contexts the innermost that selects a layer
    decides. `nn.jit` keeps a trace for all modules that are alike, whatever their
    paths: in it a decision by path holds for the first of them.

    Args:
      dropit: the policy.
      skip_first: whether the first layer of each call of a model keeps its input: the
        data, which are there anyway (paper, §3.4).
      only: a glob, or several: the paths of the layers to apply the policy to, such as
        `"encoder/*/mlp/*"`; `*` matches "/" too. `None`: all.
      exclude: the paths of layers to leave alone.

    Returns:
      A context that gives an `Interception`: the layers, and their bytes.

    Raises:
      TypeError: `dropit` is not a policy, or a pattern not a string.
      ValueError: `only` is empty; on leaving, a pattern matched none of the layers.
    """
    if not isinstance(dropit, DropIT):
        raise TypeError(
            f"intercept takes a DropIT policy, got {dropit!r}; presets are for "
            "dropit_jax.drop."
        )
    return _intercepting(
        Interception(dropit, matching.matching(skip_first, only, exclude))
    )


@contextlib.contextmanager
def _intercepting(interception: Interception) -> Iterator[Interception]:
    def interceptor(
        method: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: Any,
    ) -> Any:
        module = context.module
        if module.scope is None:
            return method(*args, **kwargs)
        with _model_call(module.scope) as call:
            if not caching.is_layer_call(context):
                return method(*args, **kwargs)
            path = "/".join(module.path)
            call.first = path if call.first is None else call.first
            every = _interceptions.get()
            for each in every:
                each.see(path, call.first)
            if caching.has_policy(module) or caching.stateful_product(module):
                return method(*args, **kwargs)
            selecting = [each for each in every if each.selects(path, call.first)]
            if not selecting or selecting[-1] is not interception:
                return method(*args, **kwargs)
            return interception.run(module, path, method, args, kwargs)

    within = (*_interceptions.get(), interception)
    token = _interceptions.set(within)
    try:
        with (
            nn.intercept_methods(interceptor),
            _traced_within(tuple(each.key for each in within)),
        ):
            yield interception
    finally:
        _interceptions.reset(token)
    interception.check()


@dataclasses.dataclass
class _ModelCall:
    """One call of a model, from outside any module.

    Attributes:
      first: the path of the first layer that it came to.
    """

    first: str | None = None


_call: contextvars.ContextVar[_ModelCall | None]
_call = contextvars.ContextVar("call", default=None)

# The calls under way, by the identity of their root scopes.
_calls: dict[int, tuple[Callable[[], Scope | None], _ModelCall]] = {}


@contextlib.contextmanager
def _model_call(scope: Scope) -> Iterator[_ModelCall]:
    """Gives the call of a model that a scope belongs to; a new one if to none.

    Where the applied method is a function (`model.apply(..., method=f)`), no module's
    call is around those of the layers; but all have one root scope, which is made for
    each `init`, `apply` and `bind`. In a loop or another lifted transformation scopes
    have other roots, and there a module's call is around.
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


def _call_of(root: Scope) -> _ModelCall:
    place = id(root)
    known, call = _calls.get(place, (lambda: None, _ModelCall()))
    if known() is root:
        return call

    def forget(_: Any) -> None:
        _calls.pop(place, None)

    _calls[place] = (weakref.ref(root, forget), call := _ModelCall())
    return call
