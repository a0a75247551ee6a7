"""Splits a function into two programs, its forward and its backward pass."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dropit_jax import compat
from dropit_jax.compat import Jaxpr
from dropit_jax.memory.traced import residuals
from dropit_jax.transform.tracing import program as programs
from dropit_jax.transform.tracing.program import Atom, Program

Function = Callable[..., Sequence[Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """The forward and the backward pass of a function of arrays.

    Attributes:
      forward: `inputs -> (*results, *residuals)`.
      backward: `(*residuals, *cotangents) -> gradients`, with a cotangent for each
        floating result and a gradient for each perturbed input.
      perturbed: for each input, whether it is differentiated.
      floating: for each result, whether it has a cotangent.
      traced: the jaxprs of both passes.
    """

    forward: Program
    backward: Program
    perturbed: tuple[bool, ...]
    floating: tuple[bool, ...]
    traced: tuple[Jaxpr, Jaxpr]

    @property
    def residuals(self) -> tuple[Atom, ...]:
        """The residuals, as atoms of the forward pass."""
        return self.forward.outputs[len(self.floating) :]

    @property
    def residual_bytes(self) -> int:
        """The bytes of the residuals that are neither arguments nor constants."""
        found = residuals.residuals_between(*self.traced, len(self.residuals))
        return found.total_bytes

    @property
    def cotangents(self) -> tuple[int, ...]:
        """The cotangents, as inputs of the backward pass."""
        return self.backward.inputs[len(self.residuals) :]


def split(function: Function, avals: Sequence[Any], perturbed: Sequence[bool]) -> Split:
    """Traces a function and its pullback, as `jax.vjp` makes it, to two programs.

    Args:
      function: a function of arrays that returns a sequence of arrays.
      avals: the types of the arguments.
      perturbed: for each argument, whether it is differentiated.
    """
    places = [i for i, is_perturbed in enumerate(perturbed) if is_perturbed]
    structure: Any = None
    results: list[Any] = []

    def forward(*arrays: Any) -> list[Any]:
        def of_perturbed(*values: Any) -> Sequence[Any]:
            given = dict(enumerate(arrays)) | dict(zip(places, values, strict=True))
            return function(*given.values())

        nonlocal structure, results
        outputs, pullback = jax.vjp(of_perturbed, *[arrays[i] for i in places])
        leaves, structure = jax.tree.flatten(pullback)
        results = [jax.typeof(output) for output in outputs]
        return [*outputs, *leaves]

    traced = jax.make_jaxpr(forward)(*avals)
    floating = tuple(is_floating(aval) for aval in results)
    given = traced.out_avals[len(results) :]

    def backward(given: Sequence[Any], cotangents: Sequence[Any]) -> Sequence[Any]:
        found = iter(cotangents)
        complete = [
            next(found) if has_one else np.zeros(aval.shape, jax.dtypes.float0)
            for aval, has_one in zip(results, floating, strict=True)
        ]
        return jax.tree.unflatten(structure, given)(complete)

    wanted = [aval for aval, has_one in zip(results, floating, strict=True) if has_one]
    pulled = jax.make_jaxpr(backward)(given, wanted)
    return Split(
        programs.flatten(traced),
        programs.flatten(pulled),
        tuple(perturbed),
        floating,
        (compat.open_jaxpr(traced), compat.open_jaxpr(pulled)),
    )


def is_floating(aval: Any) -> bool:
    """Returns whether values of this type have a cotangent of the same type."""
    if not hasattr(aval, "dtype") or compat.is_reference(aval):
        return False
    return bool(jnp.issubdtype(aval.dtype, jnp.inexact))
