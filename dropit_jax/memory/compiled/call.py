"""A call of a function that is compiled: its arrays, and which of them it donates."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from dropit_jax import compat

# Not functions that others jitted, such as those of `nnx.jit`, which take other trees.
_JITTED = type(jax.jit(lambda: None))


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """A function and its abstract arguments.

    Attributes:
      function: the function.
      jitted: the same, as `jax.jit` gave it.
      arguments: all of them.
      static: the positions of those that are no arrays to it.
      donated: of each leaf of the others, whether it is donated.
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
    ) -> "Call":
        """Finds out what is donated, and of a jitted function what is static.

        Args:
          step: the function, jitted or not.
          arguments: as arrays or `jax.ShapeDtypeStruct`s.
          donate: indices of arguments.

        Raises:
          ValueError: `donate` names an argument that there is not, or the function
            says itself what it donates; or static arguments cannot be told.
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
        static = _static(arguments, len(arguments) - len(given))
        donated = [leaf.donated for leaf in jax.tree.leaves(given)]
        if not wanted:
            return cls(step, own, arguments, static, tuple(donated))
        if static or any(donated):
            raise ValueError(
                f"donate={donate!r}: the function is jitted, and says itself what it "
                "donates; say so there, by jax.jit(..., donate_argnums=...)."
            )
        return cls.of(functools.partial(step), arguments, wanted)

    @property
    def leaves(self) -> list[Any]:
        """The leaves of the arguments that are not static."""
        return jax.tree.leaves(self._arrays)

    @property
    def names(self) -> list[str]:
        """Names for these leaves."""
        return [
            f"args[{position}]{jax.tree_util.keystr(path)}"
            for position, argument in enumerate(self.arguments)
            if position not in self.static
            for path, _ in jax.tree_util.tree_leaves_with_path(argument)
        ]

    def flat(self, *leaves: Any) -> list[Any]:
        """The leaves of the results, given those of the arguments."""
        given = iter(jax.tree.unflatten(jax.tree.structure(self._arrays), leaves))
        complete = [
            argument if position in self.static else next(given)
            for position, argument in enumerate(self.arguments)
        ]
        return jax.tree.leaves(self.function(*complete))

    def host_call(self) -> str | None:
        """Where the function calls Python on the host, if it does."""
        for equation in _equations(self.jitted.trace(*self.arguments).jaxpr):
            if equation.primitive.name in compat.HOST_CALLS:
                name, line = equation.primitive.name, compat.source_line(equation)
                return f"{name} at {line}"
        return None

    @property
    def _arrays(self) -> list[Any]:
        return [
            argument
            for position, argument in enumerate(self.arguments)
            if position not in self.static
        ]


def _positions(donate: int | Sequence[int], count: int) -> tuple[int, ...]:
    """The indices of donated arguments, counted from the first."""
    listed = (donate,) if isinstance(donate, int) else tuple(donate)
    for index in listed:
        if not -count <= index < count:
            raise ValueError(f"donate={donate!r}: there are {count} arguments.")
    return tuple(index % count for index in listed)


def _static(arguments: tuple[Any, ...], count: int) -> frozenset[int]:
    """The positions of so many static arguments: those that have no arrays."""
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


def _equations(jaxpr: Any) -> Iterator[Any]:
    """The equations of a program and of all programs in it."""
    for equation in compat.open_jaxpr(jaxpr).eqns:
        yield equation
        for inner in compat.jaxprs_in_params(equation.params):
            yield from _equations(inner)
