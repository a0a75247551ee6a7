"""How stored values lie in a GPU's memory: as the products that read them want it."""

from dropit_jax.transform.tracing import primitives
from dropit_jax.transform.tracing.program import Program

Order = tuple[int, ...]

_ALONG = primitives.CONTINUOUS | primitives.STEPS | {"copy", "name", "stop_gradient"}


def orders(forward: Program) -> dict[int, Order]:
    """Returns how values lie that batched products read: axes, the outermost first.

    The axes of the batch come first, as in attention, whose heads lie beside each other
    otherwise. What is computed of such a value element by element lies as it does.
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
        elif node.name in _ALONG and node.outputs[0] in found:
            order = found[node.outputs[0]]
            shape = forward.avals[node.outputs[0]].shape
            for value in node.operands:
                if forward.avals[value].shape == shape:
                    found.setdefault(value, order)
    return found
