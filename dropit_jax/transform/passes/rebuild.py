"""Forward values rebuilt in the backward pass, from what is stored of others."""

from collections.abc import Iterable, Mapping
from typing import Any

from jaxtyping import Array

from dropit_jax import derivatives
from dropit_jax.transform.forms.orders import Order
from dropit_jax.transform.forms.storage import Form
from dropit_jax.transform.tracing import primitives
from dropit_jax.transform.tracing import program as programs
from dropit_jax.transform.tracing.program import Atom, Node, Program
from dropit_jax.xla import barriers

# Computed element by element, inside of the kernel that reads the result.
_CHEAP = primitives.CONTINUOUS | primitives.MOVES | primitives.STEPS

# For the error of a second derivative: that of a decoded value would be zero.
_WHAT = "A function that dropit_jax.drop made"
_INSTEAD = (
    "jax.lax.stop_gradient on its gradient, the preset 'exact', or the plain function"
)


class Rebuilder:
    """Rebuilds forward values, each once, but for those that it is told to forget."""

    def __init__(
        self,
        forward: Program,
        forms: Mapping[int, Form],
        orders: Mapping[int, Order],
        inputs: Mapping[int, Any],
        stored: Mapping[int, Any],
    ) -> None:
        """The stored values to rebuild from.

        Args:
          forward: the program that made the values.
          forms: of each stored value, how it is stored.
          orders: of some of them, how their axes lie in memory.
          inputs: those of the program that are read.
          stored: what is stored of each value.
        """
        self._avals, self._makers = forward.avals, forward.makers()
        self._forms, self._orders, self._stored = forms, orders, dict(stored)
        self._known = dict(forward.constants) | dict(inputs)
        self._inputs = frozenset(self._known)
        self._opened: set[int] = set()
        self._cheap: set[int] = set()

    def open(self, wanted: Iterable[int], after: Array) -> Array:
        """Has what is stored for these values wait for an array, and that for it.

        Args:
          wanted: the values.
          after: the array.

        Returns:
          `after`, to be read instead of it.
        """
        leaves = self._leaves(wanted) - self._opened
        if not leaves:
            return after
        order = sorted(leaves)
        opened, after = barriers.barrier(([self._stored[v] for v in order], after))
        self._stored.update(zip(order, opened, strict=True))
        self._opened |= leaves
        return after

    def __call__(self, value: int) -> Any:
        """The value."""
        for node in self._needed(value):
            results = programs.bind(node, *[self._read(atom) for atom in node.inputs])
            for made, x in zip(node.outputs, results, strict=True):
                self._known.setdefault(made, x)
            if node.name in _CHEAP and self._cheap | self._inputs >= {*node.operands}:
                self._cheap.update(node.outputs)
        return self._read(value)

    def forget(self, wanted: Iterable[int]) -> None:
        """Has values rebuilt again, element by element, where they are read next.

        They, and what they are made of, need not be in memory until then.
        """
        todo = list(wanted)
        while todo:
            value = todo.pop()
            if value not in self._cheap:
                continue
            self._cheap.remove(value)
            self._known.pop(value, None)
            self._opened.discard(value)
            if value in self._makers:
                todo.extend(self._makers[value].operands)

    def _read(self, atom: Atom) -> Any:
        if isinstance(atom, int) and atom not in self._known:
            stored, aval = self._stored[atom], self._avals[atom]
            form = self._forms[atom]
            decoded = form.decode(stored, aval, self._orders.get(atom))
            if form.is_lossy:
                decoded = derivatives.once(decoded, _WHAT, _INSTEAD)
            self._known[atom] = decoded
            self._cheap.add(atom)
        return programs.read(self._known, atom)

    def _leaves(self, wanted: Iterable[int]) -> set[int]:
        """The stored values that these are rebuilt from, if they are not yet known."""
        found, seen, todo = set(), set(self._known), list(wanted)
        while todo:
            value = todo.pop()
            if value in seen:
                continue
            seen.add(value)
            if value in self._forms:
                found.add(value)
            else:
                todo.extend(self._makers[value].operands)
        return found

    def _needed(self, value: int) -> list[Node]:
        """The equations to be computed again for a value, in order."""
        found: dict[Node, None] = {}
        todo: list[tuple[int, bool]] = [(value, False)]
        while todo:
            each, operands_done = todo.pop()
            if each in self._known or each in self._forms:
                continue
            node = self._makers[each]
            if operands_done:
                found.setdefault(node)
            elif node not in found:
                todo.append((each, True))
                todo.extend((operand, False) for operand in node.operands)
        return list(found)
