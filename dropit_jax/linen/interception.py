"""DropIT in models of others: any `flax.linen` model, left as it is.

Flax tells an interceptor of each call of a module's method. Ours decides by the path of
the module what that call is to cache, has `calls` or `parts` run it, and takes note.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array

from dropit_jax import compat, layer_presets, matching
from dropit_jax.layer_presets import LayerPreset
from dropit_jax.linen import calls, functions, model_call, parts, report, tools
from dropit_jax.linen.model_call import ModelCall
from dropit_jax.linen.report import InterceptedLayer, Unreached
from dropit_jax.matching import Matching
from dropit_jax.policy import DropIT
from dropit_jax.products import rule
from dropit_jax.products.operand import Axes


class Interception:
    """Replaces the calls of layers, as `intercept` asks, and reports on them.

    `layers` lists what caches less than in plain Flax, in the order in which the model
    came to it, with what each caches in its last call (in a loop, one step of it); it
    grows while models are traced. Layers are told apart by their paths. `unreached`
    lists what a preset could do nothing about, as far as that can be seen. As text it
    is a table of both.
    """

    def __init__(self, preset: LayerPreset, meant: Matching, tells: bool = True):
        self._preset = preset
        self._matching = meant
        self.tells = tells  # what is unreached
        self._layers: dict[Any, InterceptedLayer] = {}
        self._unreached: dict[Unreached, None] = {}  # in order
        self._seen: dict[str, None] = {}  # paths, in order
        self._later: set[str] = set()  # of these, the ones not first in some call
        self.firsts: dict[str, str] = {}  # the first layer of each module
        if preset.remat != "none":
            why = "blocks of a model that is there: put flax.linen.remat into it"
            self.missed("", f"remat={preset.remat!r}", why)

    @property
    def key(self) -> Any:
        """All that a trace depends on."""
        return self._preset, self._matching

    @property
    def acts(self) -> bool:
        """Whether there is anything to do."""
        policies = (self._preset.dropit, self._preset.conv)
        return policies != (None, None) or self.wants(1) or self.wants(8)

    @property
    def layers(self) -> list[InterceptedLayer]:
        """The layers, and functions, that cache less."""
        return list(self._layers.values())

    @property
    def unreached(self) -> tuple[Unreached, ...]:
        """The layers that were left alone for a reason, in the order of their calls."""
        return tuple(self._unreached)

    @property
    def bytes_before(self) -> int:
        """Bytes that plain Flax caches of the inputs of these layers."""
        return report.total_bytes(self.layers)[0]

    @property
    def bytes_after(self) -> int:
        """Bytes that DropIT caches of the inputs of these layers."""
        return report.total_bytes(self.layers)[1]

    def __str__(self) -> str:
        return report.table(self.layers, self.unreached)

    def wants(self, what: nn.Module | int) -> bool:
        """Whether there is something to be done about it.

        Args:
          what: one of `calls.LAYERS`, or the bits that a compact twin caches.
        """
        if isinstance(what, nn.Module):
            return self.policy(what) is not None
        return self._preset.one_bit if what == 1 else self._preset.eight_bit

    def policy(self, layer: nn.Module) -> DropIT | None:
        """Returns the policy of one of `calls.LAYERS`; `None` if it keeps its input."""
        is_convolution = isinstance(layer, calls.CONVOLUTIONS)
        return self._preset.conv if is_convolution else self._preset.dropit

    def selects(self, path: str, first: str | None = None) -> bool:
        """Whether what has this path is meant.

        Args:
          path: of a layer, or of the module that calls a function.
          first: of a layer whose input may be the data, that of the first one.
        """
        return self._matching.selects(path, first)

    def note(self, path: str, first: str | None = None) -> None:
        """Takes note of what might be meant; the arguments are those of `selects`."""
        self._seen[path] = None
        if path != first:
            self._later.add(path)

    def saw(self, path: str) -> bool:
        """Whether there was something with this path that might be meant."""
        return path in self._seen

    def missed(self, path: str, what: str, why: str) -> None:
        """Takes note of what is left alone for a reason."""
        if self.tells:
            self._unreached[Unreached(path, what, why)] = None

    def function_caught(
        self, caller: functions.Caller, name: str, x: Array, after: int
    ) -> None:
        """Takes note of a function."""
        caller.counts[name] += 1
        # One method of a module may call another.
        place = (caller.path, caller.method, name, caller.counts[name])
        self._layers[place] = InterceptedLayer(
            caller.path, name, x.shape, x.dtype, x.nbytes, after
        )

    def run_layer(
        self,
        module: nn.Module,
        method: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        call: ModelCall,
    ) -> Any:
        """The call of a layer, with DropIT."""
        path, policy = model_call.path(module), self.policy(module)

        def observe(lhs: Array, axes: Axes, nbytes: int) -> None:
            reader = call.first_reader(lhs, (axes, policy), path)
            before = math.prod(lhs.shape) * lhs.dtype.itemsize
            shared = reader != path
            self._layers[path] = InterceptedLayer(
                path,
                type(module).__name__,
                lhs.shape,
                lhs.dtype,
                bytes_before=0 if shared else before,
                bytes_after=0 if shared else nbytes,
                shared_with=reader if shared else None,
            )

        with rule.observed(observe):
            return calls.cached(module, method, policy, *args, **kwargs)

    def run_part(
        self,
        part: parts.Part,
        module: nn.Module,
        method: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The call of another layer, with its compact residual."""
        path, kind = model_call.path(module), type(module).__name__

        def observe(x: Array, before: int, after: int) -> None:
            self._layers[path] = InterceptedLayer(
                path, kind, x.shape, x.dtype, before, after
            )

        attention = tools.attention(self._preset)
        return parts.compacted(
            part, module, method, attention, observe, *args, **kwargs
        )

    def check(self) -> None:
        """Refuses globs that match no layer.

        Raises:
          ValueError: there are such globs. Where no layer was traced there is nothing
            to say: it may all have been compiled before.
        """
        if self._seen:
            self._matching.check(self._seen, self._seen.keys() - self._later)


# A part of the keys of JAX's caches: a function traced within `intercept` is not the
# same function outside of it.
_traced_within = jax.make_user_context(default_value=())

_interceptions: contextvars.ContextVar[tuple[Interception, ...]]
_interceptions = contextvars.ContextVar("interceptions", default=())


def intercept(
    dropit: DropIT | LayerPreset | str,
    skip_first: bool = True,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> AbstractContextManager[Interception]:
    """Makes any `flax.linen` model cache less while the context lasts.

    The model and its parameters stay as they are. All calls of Flax's own `Dense`,
    `DenseGeneral`, `Einsum`, `Conv`, `ConvLocal` and `ConvTranspose` are replaced, on
    their own, in a subclass or inside another module such as
    `MultiHeadDotProductAttention`. Layers with a policy of their own are left alone,
    and so are those whose product has a state, such as `Fp8DotGeneralOp`.
    Functions that `jax.jit` compiled outside are traced again. Of two contexts, one in
    the other, the inner one decides wherever it selects a layer and has something to do
    with it.

    With a preset Flax's norms, dropout and attention run compact too, and so do
    activation functions and max-pooling, wherever the methods of modules look them up
    in `flax.linen` or `jax.nn`, hold them in an attribute of the module, or have them
    under a name in their file. What was seen and not reached is in
    `Interception.unreached`.

    Args:
      dropit: what the layers keep of their inputs; or a preset, or its name.
      skip_first: leaves the first layer alone that a call of a model comes to: its
        input is the data, which is there anyway (paper §3.4). That is of the layers
        with a product; what else a preset does, it does everywhere.
      only: a glob, or several: the paths of the layers to replace, such as
        `"encoder/*/Dense_0"`; `*` matches "/" too. Of a function, it is the path of the
        module that calls it. `None`: all.
      exclude: the paths of layers to leave alone.

    Returns:
      A context manager that gives an `Interception`, which lists what was replaced.

    Raises:
      TypeError: `dropit` is not a policy, a preset or a name, or a pattern not a
        string.
      ValueError: there is no such preset; on leaving, a pattern matched none of the
        layers seen.
    """
    if isinstance(dropit, str):
        dropit = layer_presets.layer_preset(dropit)
    is_policy = isinstance(dropit, DropIT)
    preset = LayerPreset("", dropit, dropit) if isinstance(dropit, DropIT) else dropit
    if not isinstance(preset, LayerPreset):
        raise TypeError(
            f"intercept takes a DropIT policy, got {dropit!r}; a preset, or its name, "
            "would do as well."
        )
    meant = matching.matching(skip_first, only, exclude)
    return _intercepting(Interception(preset, meant, tells=not is_policy))


@contextlib.contextmanager
def _intercepting(interception: Interception) -> Iterator[Interception]:
    if not interception.acts:
        yield interception
        return
    model_call.tell_paths_to_jit(_innermost)
    outer = _interceptions.get()

    def interceptor(
        method: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: Any,
    ) -> Any:
        module = context.module
        if calls.is_product() or module.scope is None:
            return method(*args, **kwargs)
        with model_call.in_call(module.scope) as call:
            # (Flax's wrappers first call other methods, under other paths.)
            is_layer = isinstance(module, calls.LAYERS)
            if is_layer and context.method_name == "__call__" and call.first is None:
                call.first = model_call.path(module)
            if outer or not any(each.tells for each in _interceptions.get()):
                return _run(interception, method, args, kwargs, context, call)
            with _functions_caught(context):
                out = _run(interception, method, args, kwargs, context, call)
            _tell_of_unreached(context)
            return out

    within = (*outer, interception)
    token = _interceptions.set(within)
    catching = functions.intercepted if interception.tells else contextlib.nullcontext
    try:
        with (
            catching(),
            nn.intercept_methods(interceptor),
            _traced_within(tuple(each.key for each in within)),
        ):
            yield interception
    finally:
        _interceptions.reset(token)
    interception.check()


def _run(
    interception: Interception,
    method: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: Any,
    call: ModelCall,
) -> Any:
    """A call of a method, and what one of the interceptions does to it."""
    module = context.module
    path, kind = model_call.path(module), type(module).__name__
    is_layer, part = calls.is_layer_call(context), parts.part(context)
    if is_layer or part is not None:
        for each in _interceptions.get():  # who may not see it, if this runs it
            each.note(path, call.first)
    if is_layer:
        taker = None if calls.has_policy(module) else _taker(module, path, call.first)
        if taker is not interception:
            return method(*args, **kwargs)
        if (field := calls.stateful_product(module)) is not None:
            taker.missed(path, kind, f"its {field} has a state")
            return method(*args, **kwargs)
        return interception.run_layer(module, method, args, kwargs, call)
    run = method
    if part is not None and _taker(part.bits, path) is interception:
        why = None
        if part is parts.ATTENTION:
            why = parts.other_attention(module, kwargs.get("sow_weights", False))
        if why is None:
            run = functools.partial(interception.run_part, part, module, method)
        elif why:
            interception.missed(path, kind, why)
    out = run(*args, **kwargs)
    if call.first is not None:
        interception.firsts[path] = call.first
    return out


def _innermost() -> Interception:
    return _interceptions.get()[-1]


def _taker(
    what: nn.Module | int, path: str, first: str | None = None
) -> Interception | None:
    """The interception that decides: the innermost that wants something and selects it.

    Args:
      what: one of `calls.LAYERS`, or the bits of a compact twin.
      path: as in `Interception.selects`.
      first: likewise.
    """
    for each in reversed(_interceptions.get()):
        if each.wants(what) and each.selects(path, first):
            return each
    return None


@contextlib.contextmanager
def _functions_caught(context: Any) -> Iterator[None]:
    """Catches the functions that are called in a call of a method."""
    path, every = model_call.path(context.module), _interceptions.get()

    def listener(caught: functions.Caught) -> Interception | None:
        for each in every:
            if caught.twin is not None and each.wants(caught.bits):
                each.note(path)
        return _taker(caught.bits, path)

    caller = functions.Caller(path, context.method_name, listener)
    # What JAX has traced of a function is of no use where another decision was made.
    decisions = tuple(_taker(bits, path) is not None for bits in (1, 8))
    with (
        _traced_within((*(each.key for each in every), decisions)),
        functions.catching(caller, context.module, compat.flax_function(context)),
    ):
        yield


def _tell_of_unreached(context: Any) -> None:
    """Takes note of what a call of a method came to and could not be compacted."""
    module = context.module
    path, kind = model_call.path(module), type(module).__name__
    found: list[tuple[nn.Module | int, str, str]] = []
    if (bits := parts.without_twin(context)) is not None:
        found.append((bits, kind, "no compact twin"))
    own = parts.with_own_call(context)
    if own is not None and not any(each.saw(path) for each in _interceptions.get()):
        found.append((own, kind, "a __call__ of its own"))
    hidden = functions.out_of_reach(module, compat.flax_function(context))
    found += [(caught.bits, caught.name, where) for caught, where in hidden]
    for what, name, why in found:
        if (taker := _taker(what, path)) is not None:
            taker.missed(path, name, why)
