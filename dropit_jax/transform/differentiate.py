"""A function of arrays whose backward pass stores what a plan says."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from dropit_jax import compat
from dropit_jax.transform import program as programs
from dropit_jax.transform import rewrite, rules, split
from dropit_jax.transform.planner import Planner
from dropit_jax.transform.rewrite import Passes


class Dropped:
    """A traced function that is differentiated by a plan."""

    def __init__(
        self,
        traced: Any,
        planner: Planner,
        is_free: Sequence[bool],
        turns: int = 1,
        *,
        is_recomputed: bool = False,
    ) -> None:
        """A function as `jax.make_jaxpr` traced it.

        Args:
          traced: the function.
          planner: of it and of the bodies in it.
          is_free: of each input, whether it is alive anyway.
          turns: how often it runs, as the body of a loop.
          is_recomputed: as in `planner.Choice`.
        """
        self._traced, self._planner, self._turns = traced, planner, turns
        self._is_recomputed = is_recomputed
        self._constants = compat.constants(traced)
        self._is_free = (True,) * len(self._constants) + tuple(is_free)
        self._planned: dict[Any, Passes] = {}

    def __call__(self, *arrays: Any) -> Sequence[Any]:
        """What the function returns."""
        return _call(self, *self._constants, *arrays)

    def plain(self, *arrays: Any) -> Sequence[Any]:
        """The same, of the constants and the inputs, not to be differentiated."""
        jaxpr, count = compat.open_jaxpr(self._traced), len(self._constants)
        return jax.core.eval_jaxpr(jaxpr, arrays[:count], *arrays[count:])

    def plan(self, is_perturbed: Sequence[bool]) -> None:
        """Makes the planner plan for these inputs to be differentiated."""
        jaxpr = compat.open_jaxpr(self._traced)
        variables = (*jaxpr.constvars, *jaxpr.invars)
        avals = tuple(variable.aval for variable in variables)
        wanted = (False,) * len(self._constants) + tuple(is_perturbed)
        pairs = zip(wanted, avals, strict=True)
        self.passes(tuple(w and split.is_floating(aval) for w, aval in pairs), avals)

    def passes(self, perturbed: tuple[bool, ...], avals: tuple[Any, ...]) -> Passes:
        """The passes when these of the constants and inputs are differentiated."""
        key = perturbed, avals
        if key not in self._planned:
            halves = split.split(self._with_bodies, avals, perturbed)
            pairs = zip(self._is_free, perturbed, strict=True)
            final = tuple(free for free, is_perturbed in pairs if is_perturbed)
            forms = self._planner.choose(
                halves,
                self._is_free,
                final,
                self._turns,
                is_recomputed=self._is_recomputed,
            )
            self._planned[key] = Passes(halves, forms, final)
        return self._planned[key]

    def _with_bodies(self, *arrays: Any) -> Sequence[Any]:
        program = programs.flatten(self._traced, rules.DIFFERENTIABLE, hoisted=True)
        return rules.run(program, arrays, self._drop_body)

    def _drop_body(
        self,
        traced: Any,
        is_free: Sequence[bool],
        *,
        turns: int = 1,
        is_recomputed: bool = False,
    ) -> "Dropped":
        return Dropped(
            traced,
            self._planner,
            is_free,
            turns * self._turns,
            is_recomputed=is_recomputed or self._is_recomputed,
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _call(dropped: Dropped, *arrays: Any) -> Sequence[Any]:
    return dropped.plain(*arrays)


def _forward(dropped: Dropped, *primals: CustomVJPPrimal) -> tuple[Any, Any]:
    arrays = [primal.value for primal in primals]
    avals = tuple(map(jax.typeof, arrays))
    perturbed = tuple(
        primal.perturbed and split.is_floating(aval)
        for primal, aval in zip(primals, avals, strict=True)
    )
    passes = dropped.passes(perturbed, avals)
    results, stored = rewrite.run_forward(passes, arrays)
    inputs = {
        value: array
        for value, array in zip(passes.halves.forward.inputs, arrays, strict=True)
        if value in passes.read
    }
    return results, _Saved(passes, inputs, stored)


def _backward(dropped: Dropped, saved: "_Saved", cotangents: Sequence[Any]) -> Any:
    del dropped
    passes, halves = saved.passes, saved.passes.halves
    wanted = [c for c, yes in zip(cotangents, halves.floating, strict=True) if yes]
    is_zero = [isinstance(cotangent, SymbolicZero) for cotangent in wanted]
    backward, gone = split.without_zeros(halves, is_zero)
    final = [f for f, zero in zip(passes.final, gone, strict=True) if not zero]
    found = iter(
        rewrite.run_backward(
            passes, backward, saved.inputs, saved.stored, wanted, final
        )
    )
    zeros = iter(gone)
    return tuple(
        next(found) if is_perturbed and not next(zeros) else None
        for is_perturbed in halves.perturbed
    )


_call.defvjp(_forward, _backward, symbolic_zeros=True)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("inputs", "stored"),
    meta_fields=("passes",),
)
@dataclasses.dataclass(frozen=True)
class _Saved:
    """What the backward pass has.

    Attributes:
      passes: how it runs.
      inputs: the inputs that it reads, by value.
      stored: what is stored of other values.
    """

    passes: Passes
    inputs: dict[int, Any]
    stored: dict[int, Any]
