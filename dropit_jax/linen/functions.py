"""Activation functions and max-pooling, caught where the modules of a model call them.

They are no modules, so that Flax tells of none of their calls. A model comes to them in
three ways. It looks them up when it calls them (`nn.relu(x)`, `jax.nn.gelu(x)`); it
holds them in a field; or its file has them under a name of its own (`from jax.nn import
gelu`). In each of these places stands, while `intercepted` lasts, a function that asks
whose call it is a part of. Only there does it do anything else than the function whose
place it has: in other threads and outside of a module's call nobody can tell.
"""

import contextlib
import contextvars
import dataclasses
import functools
import inspect
import math
import operator
import types
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from flax.linen import activation, pooling
from jaxtyping import Array

from dropit_jax import hooks
from dropit_jax import nn as compact
from dropit_jax.compat import Var, open_jaxpr

# What caches a bit or an index, and what 8 bits. `swish` is `silu`.
_ONE_BIT = ("relu", "relu6", "leaky_relu", "max_pool")
_EIGHT_BIT = ("gelu", "silu", "tanh", "sigmoid")
# What caches its input or its result whole, in Flax and here. `hard_swish` is
# `hard_silu`.
_WITHOUT_TWIN = (
    *("celu", "elu", "glu", "hard_sigmoid", "hard_silu", "hard_tanh", "log_sigmoid"),
    *("log_softmax", "mish", "selu", "soft_sign", "softmax", "softplus", "squareplus"),
)
NAMES = (*_ONE_BIT, *_EIGHT_BIT)

# The twin computes each place of a window on its own: of larger ones the program would
# be long.
_LARGEST_WINDOW = 2**8

# Where functions are looked up; and whose own look-ups and names are none of a model's:
# the twins call the functions themselves.
_MODULES = (jax.nn, nn, activation, pooling)
_NOT_MODELS = ("dropit_jax.nn.", "flax.", "jax.")
# Longer dictionaries in a file are no tables of functions.
_LONGEST_TABLE = 2**8


class Listener(Protocol):
    """What is told of the functions that it makes compact."""

    def function_caught(
        self, caller: "Caller", name: str, x: Array, after: int
    ) -> None:
        """One ran compact: its input, and what it caches, in bytes."""

    def missed(self, path: str, what: str, why: str) -> None:
        """One is left as it is."""


@dataclasses.dataclass
class Caller:
    """The call of a module's method.

    Attributes:
      path: the module's.
      method: the method's name.
      listener: who wants a function to run compact here; `None`: nobody.
      counts: how often each function was called in it.
    """

    path: str
    method: str
    listener: "Callable[[Caught], Listener | None]"
    counts: Counter[str] = dataclasses.field(default_factory=Counter)


_caller: contextvars.ContextVar[Caller | None]
_caller = contextvars.ContextVar("caller", default=None)


class Caught:
    """A function that runs compact in the call of a module that this is wanted for.

    Attributes:
      name: the function's.
      plain: the function.
      twin: its compact twin; `None`: there is none.
      bits: that the twin caches of an element, 1 (or an index) or 8.
      why_not: why there is no twin.
    """

    def __init__(self, name: str, plain: Any, twin: Any, bits: int, why_not: str = ""):
        functools.update_wrapper(self, plain)
        self._signature = inspect.signature(plain)
        self.name = name
        self.plain = plain
        self.twin = twin
        self.bits = bits
        self.why_not = why_not

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The value is the function's in any case."""
        caller = _caller.get()
        listener = None if caller is None else caller.listener(self)
        if caller is None or listener is None:
            return self.plain(*args, **kwargs)
        try:
            given = self._signature.bind(*args, **kwargs).arguments
        except TypeError:  # the function says it better
            return self.plain(*args, **kwargs)
        x, *_ = given.values()
        if not (isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)):
            return self.plain(*args, **kwargs)
        if (why := self._why_left_alone(given)) is not None:
            listener.missed(caller.path, self.name, why)
            return self.plain(*args, **kwargs)
        out = self.twin(*args, **kwargs)
        options = tuple((name, _hashable(given[name])) for name in [*given][1:])
        after = _bytes_after(self, x.shape, x.dtype, options)
        listener.function_caught(caller, self.name, x, after)
        return out

    def _why_left_alone(self, given: dict[str, Any]) -> str | None:
        if self.twin is None:
            return self.why_not
        # Numbers of NumPy have a type, which decides that of the result.
        if type(given.get("negative_slope", 0.0)) not in (int, float):
            return "its negative_slope is an array"
        if math.prod(given.get("window_shape", ())) > _LARGEST_WINDOW:
            return f"a window of more than {_LARGEST_WINDOW} elements"
        return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)

    def __reduce__(self) -> Any:  # a copy is the function, for it may outlive all this
        return _plain, (self.name,)

    def __repr__(self) -> str:
        return repr(self.plain)


def _known() -> Iterator[Caught]:
    for names, bits in ((_ONE_BIT, 1), (_EIGHT_BIT, 8)):
        for name in names:
            plain = nn.max_pool if name == "max_pool" else getattr(jax.nn, name)
            yield Caught(name, plain, getattr(compact, name), bits)
    for name in _WITHOUT_TWIN:
        yield Caught(name, getattr(jax.nn, name), None, 8, "no compact twin")


_KNOWN = {id(caught.plain): caught for caught in _known()}
_BY_NAME = {caught.name: caught for caught in _KNOWN.values()}
# The very same function as `jax.nn.tanh`. Who looks it up here means mathematics, whose
# gradient need not bear 8 bits.
_JNP_TANH = Caught(
    *("jnp.tanh", jnp.tanh, None, 8),
    why_not="looked up in jax.numpy, not in jax.nn or flax.linen",
)


def _plain(name: str) -> Any:
    return _JNP_TANH.plain if name == _JNP_TANH.name else _BY_NAME[name].plain


def _find(value: Any) -> Caught | None:
    caught = _KNOWN.get(id(value))
    return caught if caught is not None and caught.plain is value else None


def kept_bytes(
    function: Callable[..., Any], *args: Any, arguments: bool = False, **kwargs: Any
) -> int:
    """What the backward pass of a function reads, as traced, in bytes.

    Nothing runs.

    Args:
      function: of arrays.
      *args: its arguments: pytrees of arrays, or of `jax.ShapeDtypeStruct`s, and
        whatever else.
      arguments: whether arguments count that are kept as they are.
      **kwargs: as `args`.
    """
    leaves, structure = jax.tree.flatten((args, kwargs))
    shapes = {
        i: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for i, leaf in enumerate(leaves)
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    }
    floating = [i for i, s in shapes.items() if jnp.issubdtype(s.dtype, jnp.floating)]

    def residual(arrays: dict[int, Array]) -> Any:
        def of_floating(some: dict[int, Array]) -> Any:
            every = [(arrays | some).get(i, leaf) for i, leaf in enumerate(leaves)]
            args, kwargs = jax.tree.unflatten(structure, every)
            return function(*args, **kwargs)

        _, pullback = jax.vjp(of_floating, {i: arrays[i] for i in floating})
        return pullback

    jaxpr = open_jaxpr(jax.make_jaxpr(residual)(shapes))
    kept = {v for v in jaxpr.outvars if isinstance(v, Var)}
    if not arguments:
        kept -= set(jaxpr.invars)
    avals: list[Any] = [variable.aval for variable in kept]
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in avals)


@functools.lru_cache(maxsize=1024)
def _bytes_after(
    caught: Caught, shape: tuple[int, ...], dtype: Any, options: tuple[Any, ...]
) -> int:
    x = jax.ShapeDtypeStruct(shape, dtype)
    return kept_bytes(functools.partial(caught.twin, **dict(options)), x)


def _hashable(value: Any) -> Any:
    several = isinstance(value, list | tuple | np.ndarray)
    return tuple(map(_hashable, value)) if several else value


def intercepted() -> contextlib.AbstractContextManager[None]:
    """Puts what asks in the place of the functions, for as long as it lasts."""
    return _stand_ins.in_modules(_looked_up)


@contextlib.contextmanager
def catching(
    caller: Caller, module: nn.Module, method: Callable[..., Any]
) -> Iterator[None]:
    """Catches the functions that are called in one call of a module's method.

    Args:
      caller: that call.
      module: the module, whose fields hold others meanwhile.
      method: the function that is the method, in whose file others stand under the
        names of the functions until `intercepted` ends.
    """
    of_module = dict(_attributes(module))
    fields = {name: _replaced(value, _find) for name, value in of_module.items()}
    fields = {n: value for n, value in fields.items() if value is not of_module[n]}
    for function in (inspect.unwrap(method), *_python_functions(of_module)):
        _catch_names(function)
    token = _caller.set(caller)
    try:
        with hooks.replaced(module, **fields):
            yield
    finally:
        _caller.reset(token)


def out_of_reach(
    module: nn.Module, method: Callable[..., Any]
) -> Iterator[tuple[Caught, str]]:
    """The functions that a call of a method may come to unseen, and where they are."""
    of_module = dict(_attributes(module))
    for function in (inspect.unwrap(method), *_python_functions(of_module)):
        yield from _inside(function)
    for name, value in of_module.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, nn.Module | type):
            held = [getattr(value, f.name, None) for f in dataclasses.fields(value)]
            for caught in _all_in(held):
                yield caught, f"in the field {name}, a {type(value).__name__}"
    for cls in type(module).__mro__:
        for name, value in vars(cls).items():
            attribute = value.__func__ if isinstance(value, staticmethod) else value
            if name not in of_module and (found := _find(attribute)) is not None:
                yield found, f"an attribute of the class {cls.__name__}"


def _inside(function: Any) -> Iterator[tuple[Caught, str]]:
    name = getattr(function, "__name__", "a function")
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # an empty one
            for caught in _all_in(cell.cell_contents):
                yield caught, f"in the closure of {name}"
    by_keyword = getattr(function, "__kwdefaults__", None) or {}
    defaults = (*(getattr(function, "__defaults__", None) or ()), *by_keyword.values())
    for caught in _all_in(defaults):
        yield caught, f"a default argument of {name}"


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The fields of a module, and what its `setup` has set."""
    for name, value in vars(module).items():
        if not name.startswith("_") and name not in ("parent", "name", "scope"):
            yield name, value


def _all_in(value: Any) -> list[Caught]:
    found: list[Caught] = []

    def find(value: Any) -> None:
        if (caught := _find(value)) is not None:
            found.append(caught)

    _replaced(value, find)
    return found


def _python_functions(value: Any) -> list[types.FunctionType]:
    """The functions in something that are none of those known."""
    found: list[types.FunctionType] = []

    def find(value: Any) -> None:
        if isinstance(value, types.FunctionType) and _find(value) is None:
            found.append(value)

    _replaced(value, find)
    return found


def _replaced(value: Any, find: Callable[[Any], Any]) -> Any:
    """A function, or what holds some, with others in their place.

    Args:
      value: anything; what is inside of partial functions, lists, tuples and
        dictionaries is looked at.
      find: what is to stand in the place of something; `None`: itself.

    Returns:
      The very same object where nothing in it has another in its place.
    """
    if (other := find(value)) is not None:
        return other
    if type(value) is functools.partial:
        parts = [value.func, value.args, value.keywords]
        func, args, keywords = new = [_replaced(part, find) for part in parts]
        same = all(map(operator.is_, parts, new))
        return value if same else functools.partial(func, *args, **keywords)
    if type(value) in (list, tuple):
        new = [_replaced(item, find) for item in value]
        return value if all(map(operator.is_, value, new)) else type(value)(new)
    if type(value) in (dict, FrozenDict):
        items = dict(value.items())
        new = [_replaced(item, find) for item in items.values()]
        same = all(map(operator.is_, items.values(), new))
        return value if same else type(value)(zip(items, new, strict=True))
    return value


def _catch_names(function: Any) -> None:
    """Catches what goes by a name in the file of a function, or of one it calls."""
    if not isinstance(function, types.FunctionType):
        return
    file = function.__globals__
    called = (file.get(name) for name in function.__code__.co_names)
    others = (f.__globals__ for f in called if isinstance(f, types.FunctionType))
    for names in (file, *others):
        if not str(names.get("__name__")).startswith(_NOT_MODELS):
            _stand_ins.in_dictionary(names, _by_name)
            for name, value in list(names.items()):
                is_table = type(value) is dict and len(value) <= _LONGEST_TABLE
                if is_table and not str(name).startswith("__"):
                    _stand_ins.in_dictionary(value, _by_name)


def _by_name(value: Any) -> Any:
    is_function = _find(value) is not None or type(value) is functools.partial
    return _replaced(value, _find) if is_function else value


def _is_model(reader: str) -> bool:
    return _caller.get() is not None and not reader.startswith(_NOT_MODELS)


def _known_in(module: types.ModuleType) -> dict[str, Caught]:
    found = {name: _find(value) for name, value in vars(module).items()}
    return {name: caught for name, caught in found.items() if caught is not None}


_stand_ins = hooks.StandIns(_is_model)
_looked_up: dict[types.ModuleType, dict[str, Caught]]
_looked_up = {module: _known_in(module) for module in _MODULES}
_looked_up[jnp] = {"tanh": _JNP_TANH}
