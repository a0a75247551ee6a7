"""Rules that replace equations before JAX differentiates the function.

Loops, conditionals, `jax.shard_map` and `jax.checkpoint` are bound again with bodies
that have plans of their own: a loop then stacks the residuals that its body stores.
Max-pooling stores the place of each maximum in its window.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from dropit_jax import compat
from dropit_jax.transform.tracing import max_pooling, primitives
from dropit_jax.transform.tracing import program as programs
from dropit_jax.transform.tracing.program import Node, Program

# Makes a `differentiate.PlannedFunction` of a body. Its arguments are the jaxpr,
# whether each input stays in memory anyway, `turns` (the number of iterations) and
# `is_recomputed` (whether the backward pass runs the body again).
DropBody = Callable[..., Any]

# `programs.flatten` must not inline these: they have derivatives of their own.
DIFFERENTIABLE = frozenset({"custom_jvp_call", compat.CUSTOM_VJP})


def run(program: Program, arguments: Sequence[Any], drop_body: DropBody) -> list[Any]:
    """Runs a program by these rules, and returns its outputs.

    Args:
      program: the program.
      arguments: one array for each input.
      drop_body: makes a planned function of the body of a loop or the like.
    """

    def evaluate(node: Node, *operands: Any) -> Sequence[Any]:
        rule = _rule(node)
        if rule is None:
            return programs.bind(node, *operands)
        with compat.under(node.equation):
            return rule(node, operands, drop_body)

    return programs.run(program, arguments, evaluate)


def has_any(program: Program) -> bool:
    """Returns whether one of these rules applies to an equation of the program."""
    return any(_rule(node) is not None for node in program.nodes)


def _scan(node: Node, operands: Sequence[Any], drop_body: DropBody) -> Sequence[Any]:
    consts, carried = compat.scan_counts(node.equation)
    params, end = node.params, consts + carried
    xs = operands[end:]
    # Carries are new in every iteration; the other inputs stay in memory outside.
    is_free = [True] * consts + [False] * carried + [True] * len(xs)
    length = params["length"]
    body = drop_body(params["jaxpr"], is_free, turns=compat.concrete(length))

    keys = None
    if body.key is not None:
        keys = jax.random.split(body.key, length)

    def turn(carry: Sequence[Any], given: tuple[Any, Any]) -> tuple[Any, Any]:
        slices, key = given
        results = body(*operands[:consts], *carry, *slices, key=key)
        return results[:carried], results[carried:]

    carry, stacked = lax.scan(
        turn,
        list(operands[consts:end]),
        (list(xs), keys),
        length=length if isinstance(length, int) else None,  # symbolic: that of xs
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *stacked]


def _cond(node: Node, operands: Sequence[Any], drop_body: DropBody) -> Sequence[Any]:
    if node.params.get("branches_platforms") is not None:
        return programs.bind(node, *operands)
    index, *others = operands
    branches = [
        drop_body(branch, [True] * len(others)) for branch in node.params["branches"]
    ]
    return lax.switch(index, branches, *others)


def _shard_map(
    node: Node, operands: Sequence[Any], drop_body: DropBody
) -> Sequence[Any]:
    body = drop_body(node.params["jaxpr"], [True] * len(operands))
    arguments = compat.shard_map_arguments(node.equation)
    return jax.shard_map(lambda *shards: tuple(body(*shards)), **arguments)(*operands)


def _remat(node: Node, operands: Sequence[Any], drop_body: DropBody) -> Sequence[Any]:
    remat = compat.remat(node.equation)
    assert remat is not None
    jaxpr, policy, prevent_cse = remat
    body = drop_body(jaxpr, [True] * len(operands), is_recomputed=True)
    return jax.checkpoint(body, policy=policy, prevent_cse=prevent_cse)(*operands)


# A place in a window takes 16 bits at most.
_MOST_PLACES = 2**16


def _largest_of_windows(
    node: Node, operands: Sequence[Any], drop_body: DropBody
) -> Sequence[Any]:
    """Pools by maxima; JAX's derivative of it would store the whole operand.

    Dilated windows, and windows of more than `_MOST_PLACES` elements, are bound
    unchanged.
    """
    del drop_body
    (x,), params = operands, node.params
    dilation = {*params["base_dilation"], *params["window_dilation"]}
    if dilation != {1} or math.prod(params["window_dimensions"]) > _MOST_PLACES:
        return programs.bind(node, *operands)
    return [
        max_pooling.largest_of_windows(
            x,
            params["window_dimensions"],
            params["window_strides"],
            params["padding"],
        )
    ]


def has_reference(node: Node) -> bool:
    """Returns whether an equation gives a mutable reference to a body."""
    has_body = _rule(node) is not None or node.name in primitives.BODIES
    return has_body and any(
        compat.is_reference(variable.aval) for variable in node.equation.invars
    )


def _rule(node: Node) -> Callable[..., Sequence[Any]] | None:
    """Returns the rule for an equation; `None` if it is bound unchanged."""
    if compat.remat(node.equation) is not None:
        return _remat
    return _RULES.get(node.name)


_RULES = {
    "reduce_window_max": _largest_of_windows,
    "scan": _scan,
    "cond": _cond,
    "shard_map": _shard_map,
}
