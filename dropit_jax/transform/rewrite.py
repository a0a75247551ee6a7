"""The two passes as they run: the forward one stores, the backward one rebuilds.

A value is encoded right where it is made, and rebuilt right before the first equation
that reads it, after the cotangent that it meets there: `lax.optimization_barrier` keeps
XLA from encoding late and from rebuilding early.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from dropit_jax import barriers
from dropit_jax.transform import classify, primitives
from dropit_jax.transform import program as programs
from dropit_jax.transform.program import Atom, Constant, Node, Program
from dropit_jax.transform.split import Halves
from dropit_jax.transform.storage import Exact, Form


@dataclasses.dataclass(frozen=True, eq=False)
class Passes:
    """A forward and a backward pass, and what is stored between them.

    Attributes:
      halves: the passes of the function.
      forms: of each stored value of the forward pass, how it is stored.
      final: of each gradient, whether nothing is computed from it.
    """

    halves: Halves
    forms: Mapping[int, Form]
    final: tuple[bool, ...]

    @functools.cached_property
    def read(self) -> frozenset[int]:
        """The inputs of the forward pass that the backward pass reads."""
        makers, found = self.halves.forward.makers(), set()
        todo = [atom for atom in self.halves.residuals if isinstance(atom, int)]
        seen = set(self.forms)
        while todo:
            value = todo.pop()
            if value in seen:
                continue
            seen.add(value)
            if value in makers:
                todo.extend(makers[value].operands)
            else:
                found.add(value)
        return frozenset(found)


def run_forward(
    passes: Passes, arguments: Sequence[Any]
) -> tuple[list[Any], dict[int, Any]]:
    """The results, and what is stored of each value."""
    stored: dict[int, Any] = {}

    def store(value: int, x: Any) -> Any:
        form = passes.forms.get(value)
        if form is None:
            return x
        if isinstance(form, Exact):
            stored[value] = _named(x)
            return x
        # A pair, so that neither is computed much later than the other.
        x, stored[value] = barriers.barrier((x, form.encode(x)))
        stored[value] = _named(stored[value])
        return x

    def evaluate(node: Node, *operands: Any) -> list[Any]:
        results = programs.bind(node, *operands)
        return [store(v, x) for v, x in zip(node.outputs, results, strict=True)]

    program, count = passes.halves.forward, len(passes.halves.floating)
    arguments = [store(v, x) for v, x in zip(program.inputs, arguments, strict=True)]
    kept = dataclasses.replace(program, outputs=program.outputs[:count])
    results = programs.run(
        programs.without_dead(kept, passes.forms), arguments, evaluate
    )
    return results, stored


def _named(stored: Any) -> Any:
    return jax.tree.map(lambda x: checkpoint_name(x, classify.STORED_NAME), stored)


def run_backward(
    passes: Passes,
    backward: Program,
    inputs: Mapping[int, Any],
    stored: Mapping[int, Any],
    cotangents: Sequence[Any],
    final: Sequence[bool],
) -> list[Any]:
    """The gradients.

    Args:
      passes: the two passes.
      backward: `(*residuals, *cotangents) -> gradients`.
      inputs: the inputs of the forward pass that are read.
      stored: what is stored of each value.
      cotangents: of the results.
      final: of each gradient, whether nothing is computed from it.
    """
    rebuild = _Rebuilder(passes, inputs, stored)
    known: dict[int, Any] = dict(backward.constants)
    residuals = dict(zip(backward.inputs, passes.halves.residuals, strict=False))
    known.update(zip(passes.halves.cotangents, cotangents, strict=True))
    moving = set(passes.halves.cotangents)

    def read(atom: Atom, after: Any) -> Any:
        if isinstance(atom, int) and atom in residuals:
            return rebuild(residuals[atom], after)
        return programs.read(known, atom)

    products = _final_products(backward, final)
    backward = _products_first(backward, products)
    last = programs.last_uses(backward)
    for node in backward.nodes:
        place = next((v for v in node.operands if v in moving), None)
        after = None if place is None else known[place]
        results = programs.bind(node, *[read(atom, after) for atom in node.inputs])
        if node in products and place is not None:
            # What else reads the cotangent waits for the gradient.
            results, known[place] = barriers.barrier((results, after))
        known.update(zip(node.outputs, results, strict=True))
        if after is not None:
            moving.update(node.outputs)
        for value in last.get(node, ()):
            known.pop(value, None)
    return [read(atom, None) for atom in backward.outputs]


def _final_products(backward: Program, final: Sequence[bool]) -> set[Node]:
    """The products that make gradients from which nothing else is computed."""
    last = classify.final_values(backward, final)
    return {
        node
        for node in backward.nodes
        if node.name in primitives.PRODUCTS and last.issuperset(node.outputs)
    }


def _products_first(backward: Program, products: set[Node]) -> Program:
    """The program with these products before all else that reads their cotangents.

    So that what was rebuilt for them need not live any longer, nor the cotangent.
    """
    makers = backward.makers()
    place = {node: i for i, node in enumerate(backward.nodes)}
    first: dict[int, int] = {}
    for node in reversed(backward.nodes):
        for value in node.operands:
            first[value] = place[node]
    order: dict[Node, float] = dict(place)
    for node in products:
        ready = max(
            (place[makers[v]] for v in node.operands if v in makers), default=-1
        )
        wanted = min(first[v] for v in node.operands)
        order[node] = max(ready, wanted - 1) + 0.5
    nodes = sorted(backward.nodes, key=lambda node: (order[node], place[node]))
    return dataclasses.replace(backward, nodes=tuple(nodes))


class _Rebuilder:
    """Rebuilds forward values in the backward pass, each once."""

    def __init__(
        self, passes: Passes, inputs: Mapping[int, Any], stored: Mapping[int, Any]
    ) -> None:
        self._passes, self._stored = passes, dict(stored)
        self._makers = passes.halves.forward.makers()
        self._known = dict(passes.halves.forward.constants) | dict(inputs)

    def __call__(self, atom: Atom, after: Array | None) -> Any:
        """The value of an atom, not computed before `after` is."""
        if isinstance(atom, Constant):
            return atom.val
        for node in self._needed(atom):
            operands = [self._read(each, after) for each in node.inputs]
            results = programs.bind(node, *operands)
            for value, x in zip(node.outputs, results, strict=True):
                self._known.setdefault(value, x)
        return self._read(atom, after)

    def _read(self, atom: Atom, after: Array | None) -> Any:
        if isinstance(atom, int) and atom not in self._known:
            form = self._passes.forms[atom]
            stored = self._stored[atom]
            if after is not None:
                stored = barriers.read_after(after, stored)
            self._known[atom] = form.decode(
                stored, self._passes.halves.forward.avals[atom]
            )
        return programs.read(self._known, atom)

    def _needed(self, atom: int) -> list[Node]:
        """The equations to be computed again for a value, in order."""
        found: dict[Node, None] = {}
        todo: list[tuple[int, bool]] = [(atom, False)]
        while todo:
            value, done = todo.pop()
            if value in self._known or value in self._passes.forms:
                continue
            node = self._makers[value]
            if done:
                found.setdefault(node)
            elif node not in found:
                todo.append((value, True))
                todo.extend((operand, False) for operand in node.operands)
        return list(found)
