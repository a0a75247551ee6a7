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

from dropit_jax.transform.forms import orders
from dropit_jax.transform.forms.storage import Exact, Form
from dropit_jax.transform.passes.rebuild import Rebuilder
from dropit_jax.transform.planning import classify
from dropit_jax.transform.tracing import primitives
from dropit_jax.transform.tracing import program as programs
from dropit_jax.transform.tracing.program import Atom, Node, Program, Scalar
from dropit_jax.transform.tracing.split import Halves
from dropit_jax.xla import barriers


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
    def orders(self) -> Mapping[int, orders.Order]:
        """How values lie in memory, where it matters."""
        return orders.orders(self.halves.forward)

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
    passes: Passes, arguments: Sequence[Any], key: Any = None
) -> tuple[list[Any], dict[int, Any]]:
    """Returns the results, and what is stored of each value.

    Args:
      passes: the two passes.
      arguments: of the forward pass.
      key: a PRNG key, where a form needs one.
    """
    stored: dict[int, Any] = {}

    def store(value: int, x: Any) -> Any:
        form = passes.forms.get(value)
        if form is None:
            return x
        if isinstance(form, Exact):
            stored[value] = _named(x)
            return x
        # A pair, so that neither is computed much later than the other.
        own_key = jax.random.fold_in(key, value) if form.needs_key else None
        encoded = form.encode(x, passes.orders.get(value), own_key)
        x, stored[value] = barriers.barrier((x, encoded))
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
    halves = passes.halves
    rebuild = Rebuilder(halves.forward, passes.forms, passes.orders, inputs, stored)
    known = dict(zip(halves.cotangents, cotangents, strict=True))
    known.update(backward.constants)  # in place of cotangents of zero, too
    reader = _Reader(backward, halves.residuals, rebuild, known)
    products = _final_products(backward, final)
    program = _products_first(backward, products)
    last = programs.last_uses(program)
    moving = {v for v in halves.cotangents if v not in backward.constants}
    repeated: dict[int, tuple[Node, Any]] = {}
    for node in program.nodes:
        met = next((value for value in node.operands if value in moving), None)
        if met is None and not node.equation.effects:
            reader.defer(node)
            continue
        wanted = reader.wanted(node)
        if met is not None:
            _open(rebuild, wanted, met, known, repeated)
        operands = [*map(reader, node.inputs)]
        results = programs.bind(node, *operands)
        if node.name == "broadcast_in_dim" and len(operands) == 1:
            repeated[node.outputs[0]] = node, operands[0]
        if met is not None and node in products:
            # What else reads the cotangent waits for the gradient.
            results, known[met] = barriers.barrier((results, known[met]))
            if _is_wider(program, node, met):
                rebuild.forget(wanted)
        known.update(zip(node.outputs, results, strict=True))
        moving.update(node.outputs)
        for value in last[node]:
            known.pop(value, None)
    return [reader(atom) for atom in program.outputs]


def _open(
    rebuild: Rebuilder,
    wanted: Sequence[int],
    met: int,
    known: dict[int, Any],
    repeated: dict[int, tuple[Node, Any]],
) -> None:
    """Has a cotangent wait for the stored values that an equation reads with it.

    An array that waits is written to memory: of a cotangent that is a few numbers
    repeated, as of a mean, the numbers wait.

    Args:
      rebuild: of the stored values.
      wanted: the values that the equation reads.
      met: the cotangent.
      known: the values of the backward pass so far.
      repeated: of such cotangents, the equation that repeats, and the numbers.
    """
    if met not in repeated:
        known[met] = rebuild.open(wanted, known[met])
        return
    node, numbers = repeated[met]
    numbers = rebuild.open(wanted, numbers)
    repeated[met] = node, numbers
    (known[met],) = programs.bind(node, numbers)


class _Reader:
    """Reads what the equations of the backward pass read.

    What depends on no cotangent is computed when an equation that does reads it.
    """

    def __init__(
        self,
        backward: Program,
        residuals: Sequence[Atom],
        rebuild: Rebuilder,
        known: dict[int, Any],
    ) -> None:
        self._residuals = dict(zip(backward.inputs, residuals, strict=False))
        self._rebuild, self._known = rebuild, known
        self._deferred: dict[int, Node] = {}

    def defer(self, node: Node) -> None:
        """Leaves an equation until what it makes is read."""
        self._deferred.update(dict.fromkeys(node.outputs, node))

    def wanted(self, node: Node) -> list[int]:
        """The forward values that an equation reads, itself or by deferred ones."""
        found, todo = [], list(node.operands)
        while todo:
            value = todo.pop()
            if value in self._residuals:
                found.append(self._residuals[value])
            elif value in self._deferred and value not in self._known:
                todo.extend(self._deferred[value].operands)
        return [*programs.values(found)]

    def __call__(self, atom: Atom) -> Any:
        if isinstance(atom, int) and atom in self._residuals:
            atom = self._residuals[atom]
            return atom.val if isinstance(atom, Scalar) else self._rebuild(atom)
        if isinstance(atom, int) and atom not in self._known:
            node = self._deferred[atom]
            results = programs.bind(node, *map(self, node.inputs))
            self._known.update(zip(node.outputs, results, strict=True))
        return programs.read(self._known, atom)


def _is_wider(backward: Program, product: Node, cotangent: int) -> bool:
    """Whether a product reads more of the forward pass than of the cotangent."""
    sizes = {v: programs.nbytes(backward.avals[v]) for v in product.operands}
    return max(sizes.values()) > sizes[cotangent]


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
