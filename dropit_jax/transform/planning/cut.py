"""A minimum cut of the forward pass chooses the stored values.

The nodes of the graph are equations and values; its sink is the backward pass. Values
that the backward pass reads are on the sink's side. An equation on that side is
recomputed, and costs its price. A value on that side whose equation is on the other is
stored, and costs its bytes.
"""

import math
from collections import deque
from collections.abc import Callable

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from dropit_jax.transform.planning.classify import Classes, Kind
from dropit_jax.transform.tracing.program import Node, Program

# Capacities are 32-bit integers: where a sum exceeds them, SciPy's `maximum_flow`
# returns 0 without an error. Finite prices are scaled to _TOTAL in all.
_INFINITE = 2**31 - 1
_TOTAL = 2**30


def stored_values(
    program: Program,
    classes: Classes,
    storing: Callable[[int], float],
    rebuilding: Callable[[Node], float],
) -> frozenset[int]:
    """Returns the values to store for the least total price.

    Of cuts of equal price, this is the nearest to the backward pass, which recomputes
    the fewest equations.

    Args:
      program: the forward pass.
      classes: the classes of its values.
      storing: returns the price of a stored value, in bytes.
      rebuilding: returns the price of a recomputed equation, in bytes; it may be
        infinite.
    """
    graph = _graph(program, classes, storing, rebuilding)
    if graph is None:
        return frozenset()
    edges, values = graph
    is_behind = _on_sink_side(edges)
    return frozenset(
        value
        for value, (maker, node) in values.items()
        if is_behind[node] > is_behind[maker]
    )


_SOURCE, _SINK = 0, 1
_Edges = dict[tuple[int, int], float]


def _graph(
    program: Program,
    classes: Classes,
    storing: Callable[[int], float],
    rebuilding: Callable[[Node], float],
) -> tuple[_Edges, dict[int, tuple[int, int]]] | None:
    """Returns the graph; `None` if the backward pass needs no value.

    Returns:
      The capacity of each edge `(from, to)`, and for each value the graph nodes of its
      equation (the source for inputs) and of itself.
    """
    if not classes.needed:
        return None
    makers = program.makers()
    edges: _Edges = {}
    values: dict[int, tuple[int, int]] = {}
    equations: dict[Node, int] = {}
    count = 2
    todo = deque(classes.needed)
    while todo:
        value = todo.popleft()
        if value in values or classes.kinds[value] is Kind.FREE:
            continue
        maker = _SOURCE
        if (node := makers.get(value)) is not None:
            if node not in equations:
                equations[node] = count
                count += 1
                edges[_SOURCE, equations[node]] = price = rebuilding(node)
                if price < math.inf:
                    todo.extend(node.operands)
            maker = equations[node]
        values[value] = maker, count
        edges[maker, count] = storing(value)
        count += 1
    for value in classes.needed:
        if value in values:
            edges[values[value][1], _SINK] = math.inf
    for node, number in equations.items():
        if edges[_SOURCE, number] < math.inf:
            for operand in node.operands:
                if operand in values:
                    edges[values[operand][1], number] = math.inf
    return edges, values


def _on_sink_side(edges: _Edges) -> np.ndarray:
    """Returns, for each node of the graph, whether it is on the sink's side."""
    count = 1 + max(max(edge) for edge in edges)
    flow, capacity = _flow(edges, count)
    unused = (capacity - flow).tocsc()
    is_behind = np.zeros(count, bool)
    is_behind[_SINK] = True
    todo = [_SINK]  # searched from the sink, the cut is the one nearest to it
    while todo:
        node = todo.pop()
        column = slice(unused.indptr[node], unused.indptr[node + 1])
        before = unused.indices[column][unused.data[column] > 0]
        new = before[~is_behind[before]]
        is_behind[new] = True
        todo.extend(new.tolist())
    return is_behind


def _flow(edges: _Edges, count: int) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Returns a maximum flow and the capacities, as `(count, count)` matrices."""
    finite = sum(price for price in edges.values() if price < math.inf)
    unit = max(finite / _TOTAL, 1e-9)
    sizes = [
        _INFINITE if price == math.inf else min(math.ceil(price / unit), _INFINITE)
        for price in edges.values()
    ]
    rows, columns = zip(*edges, strict=True)
    capacity = sparse.csr_matrix(
        (np.array(sizes, np.int32), (rows, columns)), (count, count)
    )
    flow = csgraph.maximum_flow(capacity, _SOURCE, _SINK).flow
    return flow.astype(np.int64), capacity.astype(np.int64)
