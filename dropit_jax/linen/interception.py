"""Applies a DropIT policy to the layers of an unchanged `flax.linen` model."""

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
      path: the names on the way to the layer, joined by "/".
      kind: the name of the layer's class.
      shape: the shape of the layer's input, as its product takes it: the batch axes of
        a convolution are merged, and `Conv` has padded "CIRCULAR" inputs, for example.
        Under `vmap` the mapped axis is missing, also in the bytes.
      dtype: the dtype of the layer's input, as its product takes it.
      bytes_before: the bytes of the input, which plain Flax stores in one call.
      bytes_after: the bytes of the residual.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    dtype: jax.typing.DTypeLike
    bytes_before: int
    bytes_after: int


def _with_commas(size: Any) -> str:
    """Returns a number as text, 1234 as "1,234"; a symbolic size as it is."""
    return f"{size:,}" if isinstance(size, int) else str(size)


class Interception:
    """The layers that `intercept` applied a policy to; `str` returns them as a table.

    Attributes:
      dropit: the policy.
      layers: the layers in the order of their first calls, one for each path, with the
        input of the last call (in a loop, of one iteration). They are recorded when
        JAX traces a model: a model that is traced later adds its layers, and a call for
        which `jax.jit` reuses a trace, such as one of an earlier `intercept` with
        equal arguments, adds none.
    """

    def __init__(self, dropit: DropIT, meant: Matching):
        self.dropit = dropit
        self._matching = meant
        self._layers: dict[str, InterceptedLayer] = {}
        self._paths: dict[str, None] = {}  # the paths of all layers, in order
        self._later: set[str] = set()  # the paths of layers not first in some call

    @property
    def key(self) -> Any:
        """The policy and the globs, on which a trace in the context depends."""
        return self.dropit, self._matching

    @property
    def layers(self) -> list[InterceptedLayer]:
        """The layers that the policy was applied to so far, in a new list."""
        return list(self._layers.values())

    @property
    def bytes_before(self) -> int:
        """The bytes of the layers' inputs, which plain Flax stores."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """The bytes of the layers' residuals."""
        return sum(layer.bytes_after for layer in self.layers)

    def __str__(self) -> str:
        rows = [("layer", "kind", "input", "before", "after")]
        for layer in self.layers:
            size = f"{jnp.dtype(layer.dtype).name}{list(layer.shape)}"
            sizes = _with_commas(layer.bytes_before), _with_commas(layer.bytes_after)
            rows.append((layer.path or ".", layer.kind, size, *sizes))
        total = _with_commas(self.bytes_before), _with_commas(self.bytes_after)
        rows.append((f"{len(self.layers)} layers, bytes", "", "", *total))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = (
            "  ".join(map(str.ljust, row, widths)).rstrip()  # in aligned columns
            for row in rows
        )
        return "\n".join(lines)

    def selects(self, path: str, first: str) -> bool:
        """Returns whether `skip_first` and the globs select the layer of a path.

        Args:
          path: the path of the layer.
          first: the path of the first layer of the model's call.
        """
        return self._matching.selects(path, first)

    def see(self, path: str, first: str) -> None:
        """Records the path of a layer; arguments as in `selects`."""
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
        """Returns the output of a layer with the policy applied; records the layer."""

        def record(x: Array, nbytes: int) -> None:
            kind = type(module).__name__
            self._layers[path] = InterceptedLayer(
                path, kind, x.shape, x.dtype, x.size * x.dtype.itemsize, nbytes
            )

        with rule.observed(record):
            return caching.cached(module, method, self.dropit, *args, **kwargs)

    def check(self) -> None:
        """Checks that every glob matched a layer, if any layer was called.

        Raises:
          ValueError: a glob matched no layer.
        """
        if self._paths:
            self._matching.check(self._paths, self._paths.keys() - self._later)


# The interceptions of the contexts around, the outermost first.
_interceptions: contextvars.ContextVar[tuple[Interception, ...]]
_interceptions = contextvars.ContextVar("interceptions", default=())

# A part of the key of the cache in which `jax.jit` keeps traces.
_traced_within = jax.make_user_context(default_value=())


def intercept(
    dropit: DropIT,
    skip_first: bool = True,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> AbstractContextManager[Interception]:
    """Applies a policy to the layers of any linen model that is called in the context.

    The layers are `Dense`, `DenseGeneral`, `Einsum`, `Conv`, `ConvLocal` and
    `ConvTranspose` of `flax.linen`, also as projections of attention. A layer with its
    own policy keeps it. A layer whose product is a module with a state, as for fp8,
    stays plain, and so does one of a subclass whose `__call__` does not call Flax's.
    In nested contexts the innermost one that selects a layer decides.
    `nn.jit` shares a trace among equal modules with different paths: there the decision
    for the first module holds for all of them.

    Args:
      dropit: the policy.
      skip_first: whether the first layer of each call of a model stays plain. Its input
        is the data, which is in memory anyway (paper, §3.4).
      only: one or several globs for the paths of the layers to apply the policy to,
        such as `"encoder/*/mlp/*"`; `*` matches "/" too. `None`: all layers.
      exclude: globs for the paths of layers that stay plain.

    Returns:
      A context manager that yields an `Interception`: the layers, and their bytes.

    Raises:
      TypeError: `dropit` is not a policy, or a glob is not a string.
      ValueError: `only` is empty; or, at the end of the context, a glob matched none
        of the layers traced in it, if there were any. A glob of `only` has to match
        another layer than the first if `skip_first`.
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
    """A call of a model, from outside any module.

    Attributes:
      first: the path of the first layer that the model called; `None`: none yet.
    """

    first: str | None = None


_call: contextvars.ContextVar[_ModelCall | None]
_call = contextvars.ContextVar("call", default=None)

# The calls in progress, by the `id` of their root scopes.
_calls: dict[int, tuple[Callable[[], Scope | None], _ModelCall]] = {}


@contextlib.contextmanager
def _model_call(scope: Scope) -> Iterator[_ModelCall]:
    """Yields the call of a model that a scope belongs to; a new one if there is none.

    Calls of layers belong to the call of a module around them. If the applied method is
    a function (`model.apply(..., method=f)`), no module's call is around them, but
    all their scopes have one root, made anew by each `init`, `apply` and `bind`. Inside
    a lifted transformation, such as a loop, scopes have other roots; there a call of a
    module is always around them.
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
