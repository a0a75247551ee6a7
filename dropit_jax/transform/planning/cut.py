"""Which values are stored: a minimum cut of the forward pass.

Nodes are equations and values. An equation costs its price if it is on the side of the
backward pass, where it is computed again; a value, if it is there and its equation is
not: it is stored. Whatever the backward pass reads is on its side.
"""

import math
from collections import deque
from collections.abc import Callable

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from dropit_jax.transform.planning.classify import Classes, Kind
from dropit_jax.transform.tracing.program import Node, Program

# Capacities are 32-bit integers; beyond them `maximum_flow` returns 0.
_ENDLESS = 2**31 - 1
_TOTAL = 2**30


def stored_values(
    program: Program,
    classes: Classes,
    storing: Callable[[int], float],
    rebuilding: Callable[[Node], float],
) -> frozenset[int]:
    """The values to store, at the least price in total.

    Of equal cuts the one nearest to the backward pass is taken: it rebuilds least.

    Args:
      program: the forward pass.
      classes: of its values.
      storing: the price of a stored value.
      rebuilding: the price of an equation that is computed again; it may be infinite.
    """
    graph = _graph(program, classes, storing, rebuilding)
    if graph is None:
        return frozenset()
    edges, values = graph
    behind = _behind(edges)
    return frozenset(
        value for value, (maker, node) in values.items() if behind[node] > behind[maker]
    )


_SOURCE, _SINK = 0, 1
_Edges = dict[tuple[int, int], float]


def _graph(
    program: Program,
    classes: Classes,
    storing: Callable[[int], float],
    rebuilding: Callable[[Node], float],
) -> tuple[_Edges, dict[int, tuple[int, int]]] | None:
    """The edges with their capacities; of each value, its maker's node and its own."""
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


def _behind(edges: _Edges) -> np.ndarray:
    """Of each node, whether it is on the side of the sink."""
    count = 1 + max(max(edge) for edge in edges)
    flow, capacity = _flow(edges, count)
    left = (capacity - flow).tocsc()  # what could still flow
    behind = np.zeros(count, bool)
    behind[_SINK] = True
    todo = [_SINK]
    while todo:
        node = todo.pop()
        column = slice(left.indptr[node], left.indptr[node + 1])
        before = left.indices[column][left.data[column] > 0]
        new = before[~behind[before]]
        behind[new] = True
        todo.extend(new.tolist())
    return behind


def _flow(edges: _Edges, count: int) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    finite = sum(price for price in edges.values() if price < math.inf)
    unit = max(finite / _TOTAL, 1e-9)
    sizes = [
        _ENDLESS if price == math.inf else min(math.ceil(price / unit), _ENDLESS)
        for price in edges.values()
    ]
    rows, columns = zip(*edges, strict=True)
    capacity = sparse.csr_matrix(
        (np.array(sizes, np.int32), (rows, columns)), (count, count)
    )
    flow = csgraph.maximum_flow(capacity, _SOURCE, _SINK).flow
    return flow.astype(np.int64), capacity.astype(np.int64)
