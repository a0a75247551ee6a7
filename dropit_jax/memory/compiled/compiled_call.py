"""Describes a call to compile: the function, its arguments and the donated arrays."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from dropit_jax import compat

# The type of functions of `jax.jit`. Those of other libraries, such as `nnx.jit`, have
# another type, and flatten their arguments to other trees.
_JITTED = type(jax.jit(lambda: None))


@dataclasses.dataclass(frozen=True, eq=False)
class CompiledCall:
    """A function and the arguments to compile it for.

    Attributes:
      function: the function, jitted or not.
      jitted: the jitted function, which donates the donated arguments.
      arguments: all arguments, as arrays or `jax.ShapeDtypeStruct`s; static ones as
        they are.
      static: the positions of the static arguments.
      donated: for each leaf of the arguments not in `static`, whether it is donated.
    """

    function: Callable[..., Any]
    jitted: Any
    arguments: tuple[Any, ...]
    static: frozenset[int]
    donated: tuple[bool, ...]

    @classmethod
    def of(
        cls,
        step: Callable[..., Any],
        arguments: tuple[Any, ...],
        donate: int | Sequence[int],
    ) -> "CompiledCall":
        """Returns the call of a function, with its static and donated arguments.

        Args:
          step: the function, jitted or not.
          arguments: the arguments, as arrays or `jax.ShapeDtypeStruct`s.
          donate: indices of the arguments to donate.

        Raises:
          ValueError: `donate` is out of range, or given although the function donates
            or has static arguments; or static arguments cannot be identified.
        """
        wanted = _positions(donate, len(arguments))
        if not isinstance(step, _JITTED):
            donated = [
                position in wanted
                for position, argument in enumerate(arguments)
                for _ in jax.tree.leaves(argument)
            ]
            jitted = jax.jit(step, donate_argnums=wanted)
            return cls(step, jitted, arguments, frozenset(), tuple(donated))
        own: Any = step
        given, _ = own.trace(*arguments).args_info
        static = _static_positions(arguments, len(arguments) - len(given))
        donated = [leaf.donated for leaf in jax.tree.leaves(given)]
        if not wanted:
            return cls(step, own, arguments, static, tuple(donated))
        if static or any(donated):
            raise ValueError(
                f"donate={donate!r}: the function is jitted. Name its donated "
                "arguments there, in jax.jit(..., donate_argnums=...)."
            )
        return cls.of(functools.partial(step), arguments, wanted)

    @property
    def leaves(self) -> list[Any]:
        """The leaves of the arguments that are not static."""
        return jax.tree.leaves(self._dynamic)

    @property
    def names(self) -> list[str]:
        """The names of the leaves, such as `args[0]['params']['kernel']`."""
        return [
            f"args[{position}]{jax.tree_util.keystr(path)}"
            for position, argument in enumerate(self.arguments)
            if position not in self.static
            for path, _ in jax.tree_util.tree_leaves_with_path(argument)
        ]

    def flat(self, *leaves: Any) -> list[Any]:
        """Calls the function with leaves of arguments; returns leaves of results."""
        given = iter(jax.tree.unflatten(jax.tree.structure(self._dynamic), leaves))
        complete = [
            argument if position in self.static else next(given)
            for position, argument in enumerate(self.arguments)
        ]
        return jax.tree.leaves(self.function(*complete))

    def host_call(self) -> str | None:
        """Returns the first primitive that calls Python on the host, with its line.

        `None` if there is none.
        """
        for equation in _all_equations(self.jitted.trace(*self.arguments).jaxpr):
            if equation.primitive.name in compat.HOST_CALLS:
                name, line = equation.primitive.name, compat.source_line(equation)
                return f"{name} at {line}"
        return None

    @property
    def _dynamic(self) -> list[Any]:
        return [
            argument
            for position, argument in enumerate(self.arguments)
            if position not in self.static
        ]


def _positions(donate: int | Sequence[int], count: int) -> tuple[int, ...]:
    """Returns indices of arguments, checked, and with negative ones resolved."""
    listed = tuple(np.atleast_1d(donate).tolist())
    for index in listed:
        if not -count <= index < count:
            raise ValueError(f"donate={donate!r}: there are {count} arguments.")
    return tuple(index % count for index in listed)


def _static_positions(arguments: tuple[Any, ...], count: int) -> frozenset[int]:
    """Returns the positions of the arguments without arrays: the `count` static ones.

    Raises:
      ValueError: more or fewer than `count` arguments have no arrays, and `count` is
        not 0.
    """
    if not count:
        return frozenset()
    found = [i for i, argument in enumerate(arguments) if not _has_array(argument)]
    if len(found) != count:
        raise ValueError(
            f"Of {len(arguments)} arguments {count} are static, and {len(found)} have "
            "no arrays: bind the static ones by functools.partial."
        )
    return frozenset(found)


def _has_array(argument: Any) -> bool:
    return any(hasattr(leaf, "shape") for leaf in jax.tree.leaves(argument))


def _all_equations(jaxpr: Any) -> Iterator[Any]:
    """Yields the equations of a jaxpr and of the jaxprs nested in it."""
    for equation in compat.open_jaxpr(jaxpr).eqns:
        yield equation
        for inner in compat.jaxprs_in_params(equation.params):
            yield from _all_equations(inner)
