"""Rebuilds forward values in the backward pass: decodes or recomputes them."""

from collections.abc import Iterable, Mapping
from typing import Any

from jaxtyping import Array

from dropit_jax import derivatives
from dropit_jax.transform.forms import storage
from dropit_jax.transform.forms.orders import Order
from dropit_jax.transform.forms.storage import Form
from dropit_jax.transform.tracing import primitives
from dropit_jax.transform.tracing import program as programs
from dropit_jax.transform.tracing.program import Atom, Node, Program
from dropit_jax.xla import barriers

# XLA computes them element by element, inside of the GPU kernel that reads the result.
_CHEAP = primitives.CONTINUOUS | primitives.MOVES | primitives.DISCONTINUOUS

# The error of a second derivative names these. (That of a decoded value would silently
# be zero.)
_OPERATION = "A function that dropit_jax.drop made"
_REMEDY = (
    "jax.lax.stop_gradient on its gradient, the preset 'exact', or the plain function"
)


class Rebuilder:
    """Rebuilds forward values: `rebuilder(value)` decodes or recomputes one.

    A value is rebuilt once, and again after `forget` has discarded it.
    """

    def __init__(
        self,
        forward: Program,
        forms: Mapping[int, Form],
        orders: Mapping[int, Order],
        inputs: Mapping[int, Any],
        stored: Mapping[int, Any],
    ) -> None:
        """Takes the stored values of one forward pass.

        Args:
          forward: the forward pass.
          forms: the form of each stored value.
          orders: the order of the axes of some stored values.
          inputs: the inputs of the forward pass that the backward pass reads.
          stored: the stored arrays of each stored value.
        """
        self._avals, self._makers = forward.avals, forward.makers()
        self._forms, self._orders, self._stored = forms, orders, dict(stored)
        self._known = dict(forward.constants) | dict(inputs)
        self._inputs = frozenset(self._known)
        self._opened: set[int] = set()
        self._cheap: set[int] = set()

    def open(self, wanted: Iterable[int], after: Array) -> Array:
        """Puts one barrier around an array and the stored arrays of some values.

        XLA then decodes the values no earlier than it computes the array.

        Args:
          wanted: the values, which may be recomputed from several stored ones.
          after: the array.

        Returns:
          `after` behind the barrier, to use in its place; `after` itself if there is
          nothing to decode.
        """
        leaves = self._leaves(wanted) - self._opened
        if not leaves:
            return after
        order = sorted(leaves)
        opened, after = barriers.barrier_of_passes(
            ([self._stored[v] for v in order], after)
        )
        self._stored.update(zip(order, opened, strict=True))
        self._opened |= leaves
        return after

    def __call__(self, value: int) -> Any:
        """Returns the array of a forward value."""
        for node in self._needed(value):
            results = programs.bind(node, *[self._read(atom) for atom in node.inputs])
            for made, x in zip(node.outputs, results, strict=True):
                self._known.setdefault(made, x)
            if node.name in _CHEAP and self._cheap | self._inputs >= {*node.operands}:
                self._cheap.update(node.outputs)
        return self._read(value)

    def forget(self, wanted: Iterable[int]) -> None:
        """Discards the values that decoding or cheap equations can rebuild.

        Also discards the values from which they were rebuilt, if these are cheap too,
        so that none stays in memory. The next `open` puts the stored arrays behind a
        barrier again.
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
        """Returns the array of an atom, decoded if it is a stored value."""
        if isinstance(atom, int) and atom not in self._known:
            stored, aval = self._stored[atom], self._avals[atom]
            form = self._forms[atom]
            decoded = storage.decode(stored, form, aval, self._orders.get(atom))
            if form.is_lossy:
                decoded = derivatives.differentiable_once(decoded, _OPERATION, _REMEDY)
            self._known[atom] = decoded
            self._cheap.add(atom)
        return programs.read(self._known, atom)

    def _leaves(self, wanted: Iterable[int]) -> set[int]:
        """Returns the stored values to decode for those of `wanted` not yet rebuilt."""
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
        """Returns the equations to recompute for a value, in topological order."""
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
