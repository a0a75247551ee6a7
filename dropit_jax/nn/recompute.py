"""`jax.checkpoint` whose inputs are cached in 8 bits.

    forward    y = f(x, θ)                      cached: x̃ = quantize(x), θ
    backward   ∇x, ∇θ = vjp of f at (x̃, θ)

The output is exact. The gradient is the exact one of a point nearby: every element of
x̃ is as near to that of x as `dropit_jax.nn.eight_bits` says.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from dropit_jax import derivatives
from dropit_jax.nn import eight_bits
from dropit_jax.xla import barriers, shardings

# The name of what is cached, for `jax.checkpoint_policies` and reports.
RESIDUAL_NAME = "recompute"


def recompute(
    function: Callable[..., Any], *args: Any, compact: tuple[int, ...] = (0,)
) -> Any:
    """`function(*args)`, computed again for the gradient from inputs in 8 bits.

    Args:
      function: a function of arrays and pytrees of them. It must close over nothing
        that is traced; what it is compared by decides whether JAX traces it again.
      *args: its arguments. Only floating-point ones have a gradient.
      compact: which of them are cached in 8 bits: arrays, or pytrees of them. Of these
        it is the floating-point arrays; all others are cached as they are.
    """
    leaves, structure = jax.tree.flatten(shardings.varying_alike(args, like=args))
    owners = [i for i, tree in enumerate(args) for _ in jax.tree.leaves(tree)]
    rounded = tuple(
        owner in compact and _is_floating(leaf)
        for owner, leaf in zip(owners, leaves, strict=True)
    )
    return _recomputed(function, structure, rounded, *leaves)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _recomputed(
    function: Callable[..., Any],
    structure: Any,
    rounded: tuple[bool, ...],
    *leaves: Any,
) -> Any:
    del rounded
    return function(*jax.tree.unflatten(structure, leaves))


def _forward(
    function: Callable[..., Any],
    structure: Any,
    rounded: tuple[bool, ...],
    *leaves: Any,
) -> tuple[Any, tuple[Any, ...]]:
    saved, used = [], []
    for leaf, is_rounded in zip(leaves, rounded, strict=True):
        kept = leaf
        if is_rounded:
            once = derivatives.once(leaf, "What is recomputed from 8 bits")
            leaf, kept = eight_bits.store(once, RESIDUAL_NAME)  # noqa: PLW2901
        used.append(leaf)
        saved.append(kept)
    out = function(*jax.tree.unflatten(structure, used))
    return out, tuple(saved)


def _backward(
    function: Callable[..., Any],
    structure: Any,
    rounded: tuple[bool, ...],
    saved: tuple[Any, ...],
    cotangent: Any,
) -> tuple[Any, ...]:
    # Without the barrier XLA may merge this with the forward pass, and keep that. Where
    # all is computed from rounded numbers there is nothing to merge, and a CPU, whose
    # compiler drops barriers late, does without.
    wait = barriers.barrier if all(rounded) else lax.optimization_barrier
    saved, cotangent = wait((saved, cotangent))
    leaves = [
        eight_bits.load(kept) if is_rounded else kept
        for kept, is_rounded in zip(saved, rounded, strict=True)
    ]
    places = [i for i, leaf in enumerate(leaves) if _is_floating(leaf)]

    def of_floating(floating: list[Array]) -> Any:
        every = list(leaves)
        for place, leaf in zip(places, floating, strict=True):
            every[place] = leaf
        return function(*jax.tree.unflatten(structure, every))

    _, pullback = jax.vjp(of_floating, [leaves[place] for place in places])
    (gradients,) = pullback(cotangent)
    by_place = dict(zip(places, gradients, strict=True))
    return tuple(by_place.get(i) for i in range(len(leaves)))


_recomputed.defvjp(_forward, _backward)


def _is_floating(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
