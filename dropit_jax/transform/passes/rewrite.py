"""Runs the forward pass, which stores values, and the backward pass, which reads them.

A value is encoded where it is made. It is rebuilt right before the first equation that
reads it, and after the cotangent that this equation reads with it. Barriers
(`lax.optimization_barrier`) keep XLA from encoding later and from rebuilding earlier.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from dropit_jax.transform.forms import orders, storage
from dropit_jax.transform.forms.storage import Exact, Form
from dropit_jax.transform.passes.rebuild import Rebuilder
from dropit_jax.transform.planning import classify
from dropit_jax.transform.tracing import primitives
from dropit_jax.transform.tracing import program as programs
from dropit_jax.transform.tracing.program import Atom, Node, Program, Scalar
from dropit_jax.transform.tracing.split import Split
from dropit_jax.xla import barriers


@dataclasses.dataclass(frozen=True, eq=False)
class Passes:
    """A forward and a backward pass, and the forms of the values between them.

    Attributes:
      halves: the passes of the function.
      forms: the form of each stored value of the forward pass.
      final: for each gradient, whether no other gradient is computed from it: its
        input is one that stays in memory anyway, as a parameter does.
    """

    halves: Split
    forms: Mapping[int, Form]
    final: tuple[bool, ...]

    @functools.cached_property
    def orders(self) -> Mapping[int, orders.Order]:
        """The order of the axes of values that batched products read."""
        return orders.orders(self.halves.forward)

    @functools.cached_property
    def read(self) -> frozenset[int]:
        """The forward inputs and constants from which the backward pass computes.

        It reads them as residuals, or recomputes residuals from them. An input that is
        stored in a form is not among them.
        """
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
    """Returns the results, and the stored arrays of each stored value.

    Args:
      passes: the two passes.
      arguments: the inputs of the forward pass.
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
        # One barrier for both: later equations wait for the encoding. XLA would delay
        # it otherwise, and keep the plain value in memory until then.
        own_key = jax.random.fold_in(key, value) if form.needs_key else None
        encoded = storage.encode(x, form, passes.orders.get(value), own_key)
        x, stored[value] = barriers.barrier_of_passes((x, encoded))
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
    """Names arrays, so that other plans store them exactly."""
    return jax.tree.map(lambda x: checkpoint_name(x, classify.STORED_NAME), stored)


def run_backward(
    passes: Passes,
    backward: Program,
    inputs: Mapping[int, Any],
    stored: Mapping[int, Any],
    cotangents: Sequence[Any],
    final: Sequence[bool],
) -> list[Any]:
    """Returns the gradients of `backward`.

    Args:
      passes: the two passes.
      backward: `(*residuals, *cotangents) -> gradients`, without zero gradients.
      inputs: the inputs of the forward pass that the backward pass reads.
      stored: the stored arrays of each stored value.
      cotangents: the cotangents of the floating results; `None` for zero ones.
      final: as in `Passes`, for the gradients of `backward`.
    """
    halves = passes.halves
    rebuild = Rebuilder(halves.forward, passes.forms, passes.orders, inputs, stored)
    known = dict(zip(halves.cotangents, cotangents, strict=True))
    known.update(backward.constants)  # among them the cotangents that are zero
    reader = _Reader(backward, halves.residuals, rebuild, known)
    products = _final_products(backward, final)
    program = _products_first(backward, products)
    last = programs.last_uses(program)
    steps = _steps(
        program, [v for v in halves.cotangents if v not in backward.constants]
    )
    for node in program.nodes:
        if node not in steps:
            reader.defer(node)
    wanted_first = _wanted_element_by_element(steps, reader)
    broadcasts: dict[int, tuple[Node, Any]] = {}
    for node, cotangent in steps.items():
        wanted = reader.wanted(node)
        if cotangent is not None:
            # An equation that reads no forward value waits too, if a later one reads
            # the cotangent with a forward value: XLA would compute its result and the
            # cotangent in one kernel as a tuple, whose memory it does not reuse.
            opened = wanted or wanted_first.get(cotangent, ())
            _add_barrier(rebuild, opened, cotangent, known, broadcasts)
        operands = [*map(reader, node.inputs)]
        results = programs.bind(node, *operands)
        if node.name == "broadcast_in_dim" and len(operands) == 1:
            broadcasts[node.outputs[0]] = node, operands[0]
        if cotangent is not None and node in products:
            # Other readers of the cotangent wait for this gradient, so that the
            # activation rebuilt for it is freed first.
            results, known[cotangent] = barriers.barrier_of_passes(
                (results, known[cotangent])
            )
            if _is_wider(program, node, cotangent):
                rebuild.forget(wanted)
        known.update(zip(node.outputs, results, strict=True))
        for value in last[node]:
            if value not in backward.constants:  # deferred equations may read these
                known.pop(value, None)
    return [reader(atom) for atom in program.outputs]


def _steps(program: Program, cotangents: Sequence[int]) -> dict[Node, int | None]:
    """Returns the equations that depend on cotangents or have effects, in order.

    Maps each equation to its first operand that depends on a cotangent or on an
    equation with effects, and to `None` if there is no such operand.
    """
    linear = set(cotangents)
    steps: dict[Node, int | None] = {}
    for node in program.nodes:
        operand = next((value for value in node.operands if value in linear), None)
        if operand is not None or node.equation.effects:
            steps[node] = operand
            linear.update(node.outputs)
    return steps


def _wanted_element_by_element(
    steps: Mapping[Node, int | None], reader: "_Reader"
) -> dict[int, Sequence[int]]:
    """Returns, for a cotangent, the forward values that are first read with it.

    Products are left out: no kernel computes them together with another reader.

    Args:
      steps: as `_steps` returns them.
      reader: has all deferred equations.
    """
    found: dict[int, Sequence[int]] = {}
    for node, cotangent in steps.items():
        if cotangent is None or cotangent in found or node.name in primitives.PRODUCTS:
            continue
        if wanted := reader.wanted(node):
            found[cotangent] = wanted
    return found


def _add_barrier(
    rebuild: Rebuilder,
    wanted: Sequence[int],
    cotangent: int,
    known: dict[int, Any],
    broadcasts: dict[int, tuple[Node, Any]],
) -> None:
    """Puts a barrier around a cotangent and the forward values it is read with.

    A barrier writes its arrays to memory. Where the cotangent is a broadcast of a small
    array, as that of a mean, the barrier is around the small array instead.

    Args:
      rebuild: rebuilds the forward values.
      wanted: the forward values that the equation reads.
      cotangent: the cotangent that the equation reads.
      known: the arrays of the backward pass so far; updated.
      broadcasts: the equation and the operand of each broadcast; updated.
    """
    if cotangent not in broadcasts:
        known[cotangent] = rebuild.open(wanted, known[cotangent])
        return
    node, numbers = broadcasts[cotangent]
    numbers = rebuild.open(wanted, numbers)
    broadcasts[cotangent] = node, numbers
    (known[cotangent],) = programs.bind(node, numbers)


class _Reader:
    """Returns the arrays that equations of the backward pass read: `reader(atom)`.

    An equation that depends on no cotangent is deferred until its result is read.
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
        """Defers an equation until one of its outputs is read."""
        self._deferred.update(dict.fromkeys(node.outputs, node))

    def wanted(self, node: Node) -> list[int]:
        """Returns the forward values that an equation reads.

        Includes the forward values that it depends on by deferred equations.
        """
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
            self._run_deferred(atom)
        return programs.read(self._known, atom)

    def _run_deferred(self, value: int) -> None:
        """Runs the deferred equations on which a value depends, its own one last."""
        todo = [self._deferred[value]]
        while todo:  # not by recursion: thousands may follow each other
            node = todo[-1]
            missing = [
                self._deferred[each]
                for each in node.operands
                if each not in self._known and each not in self._residuals
            ]
            if missing:
                todo += missing
                continue
            todo.pop()
            if self._known.keys().isdisjoint(node.outputs):
                results = programs.bind(node, *map(self, node.inputs))
                self._known.update(zip(node.outputs, results, strict=True))


def _is_wider(backward: Program, product: Node, cotangent: int) -> bool:
    """Returns whether a product's largest operand is larger than its cotangent."""
    sizes = {v: programs.nbytes(backward.avals[v]) for v in product.operands}
    return max(sizes.values()) > sizes[cotangent]


def _final_products(backward: Program, final: Sequence[bool]) -> set[Node]:
    """Returns the products that make final gradients."""
    last = classify.final_values(backward, final)
    return {
        node
        for node in backward.nodes
        if node.name in primitives.PRODUCTS and last.issuperset(node.outputs)
    }


def _products_first(backward: Program, products: set[Node]) -> Program:
    """Returns the program with products moved before other readers of their operands.

    The rebuilt activations and the cotangents are then freed earlier.
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
        needed = min(first[v] for v in node.operands)
        order[node] = max(ready, needed - 1) + 0.5
    nodes = sorted(backward.nodes, key=lambda node: (order[node], place[node]))
    return dataclasses.replace(backward, nodes=tuple(nodes))
