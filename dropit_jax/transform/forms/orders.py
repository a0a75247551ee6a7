"""Orders of axes in a GPU's memory, as the products that read a stored value want."""

from dropit_jax.transform.tracing import primitives
from dropit_jax.transform.tracing.program import Program

# The axes of an array, the outermost in memory first.
Order = tuple[int, ...]

_SAME_ORDER = (
    primitives.CONTINUOUS | primitives.DISCONTINUOUS | {"copy", "name", "stop_gradient"}
)


def orders(forward: Program) -> dict[int, Order]:
    """Returns the orders of values that batched products read: batch axes first.

    In attention, products over `(batch, length, heads, depth)` have the batch axes 0
    and 2, and the order (0, 2, 1, 3): each head is contiguous. Operands of elementwise
    operations have the order of the result.
    """
    found: dict[int, Order] = {}
    for node in reversed(forward.nodes):
        if node.name == "dot_general":
            _, batches = node.params["dimension_numbers"]
            for value, batch in zip(node.inputs, batches, strict=True):
                if batch and isinstance(value, int):
                    axes = range(len(forward.avals[value].shape))
                    rest = [axis for axis in axes if axis not in batch]
                    found.setdefault(value, (*batch, *rest))
        elif node.name in _SAME_ORDER and node.outputs[0] in found:
            order = found[node.outputs[0]]
            shape = forward.avals[node.outputs[0]].shape
            for value in node.operands:
                if forward.avals[value].shape == shape:
                    found.setdefault(value, order)
    return found
