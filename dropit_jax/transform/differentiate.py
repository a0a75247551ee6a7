"""A traced function whose derivative follows a plan, as one `jax.custom_vjp`."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from dropit_jax import compat
from dropit_jax.transform.passes import rewrite
from dropit_jax.transform.passes.rewrite import Passes
from dropit_jax.transform.planning.planner import PlanError, Planner
from dropit_jax.transform.tracing import program as programs
from dropit_jax.transform.tracing import rules, split
from dropit_jax.transform.tracing import zeros as zeros_lib

# `jax.random.fold_in` takes the number of a value (below this), or this plus the number
# of a body: no two draws share a key.
_FIRST_BODY = 2**31


class PlannedFunction:
    """A traced function with a derivative that stores the values its planner selects.

    `key` is the PRNG key of the forms that draw random numbers, or `None`.
    """

    def __init__(
        self,
        traced: Any,
        planner: Planner,
        is_free: Sequence[bool],
        turns: int = 1,
        *,
        is_recomputed: bool = False,
        is_body: bool = False,
        key: Any = None,
        scope: str = "",
    ) -> None:
        """Wraps a function that `jax.make_jaxpr` traced.

        Args:
          traced: the closed jaxpr.
          planner: plans the function and the bodies in it.
          is_free: for each input, whether it stays in memory anyway.
          turns: how often the function runs: the product of the lengths of the loops
            around it.
          is_recomputed: whether it is in the body of a `jax.checkpoint`.
          is_body: whether the function is the body of a loop, conditional or the like.
          key: a PRNG key for the forms that draw random numbers; not needed if every
            call gives one.
          scope: the path of the scopes around the function.
        """
        self._traced, self._planner, self._turns = traced, planner, turns
        self._is_recomputed, self._is_body, self.key = is_recomputed, is_body, key
        self._scope = scope
        self._constants = compat.constants(traced)
        self._is_keyed = planner.preset.needs_key
        before = self._is_keyed + len(self._constants)
        self._is_free = (True,) * before + tuple(is_free)
        self._planned: dict[Any, Passes] = {}
        self._tried: list[Any] = []

    def __call__(self, *arrays: Any, key: Any = None) -> Sequence[Any]:
        """Returns the results of the function.

        Args:
          *arrays: the inputs.
          key: a PRNG key; `None` takes the one given at construction.
        """
        keys = [self.key if key is None else key] if self._is_keyed else []
        inputs = (*keys, *self._constants, *arrays)
        return _call(self, *inputs) if self.has_plan else self.plain(*inputs)

    @functools.cached_property
    def has_plan(self) -> bool:
        """Returns whether a plan can replace JAX's derivative of the function.

        False if a loop, a conditional or the like takes a mutable reference: its
        derivative by JAX may write to further references, and cannot be split into two
        programs.
        """
        return not any(map(rules.has_reference, self._program.nodes))

    @functools.cached_property
    def _program(self) -> programs.Program:
        return programs.flatten(self._traced, rules.DIFFERENTIABLE, hoisted=True)

    def plain(self, *arrays: Any) -> Sequence[Any]:
        """Returns the results, computed by the original jaxpr.

        Args:
          *arrays: the key where the preset needs one, the constants, the inputs.
        """
        _, inputs = self._without_key(arrays)
        jaxpr, count = compat.open_jaxpr(self._traced), len(self._constants)
        return jax.core.eval_jaxpr(jaxpr, inputs[:count], *inputs[count:])

    def plan(self, is_perturbed: Sequence[bool]) -> int:
        """Has the planner plan the function, and returns the plain function's bytes.

        Args:
          is_perturbed: for each input, whether it is differentiated.

        Returns:
          Bytes of the residuals of the plain function.

        Raises:
          PlanError: `has_plan` is false; or as in `passes`.
          ValueError: as in `passes`.
        """
        if not self.has_plan:
            raise PlanError(
                "A loop or a conditional of the function writes to a mutable "
                "reference: drop leaves the function as it is, and has no plan of it."
            )
        jaxpr = compat.open_jaxpr(self._traced)
        keys = [_aval(self.key)] if self._is_keyed else []
        inputs = [variable.aval for variable in (*jaxpr.constvars, *jaxpr.invars)]
        avals = (*keys, *inputs)
        before = len(avals) - len(is_perturbed)
        wanted = (False,) * before + tuple(is_perturbed)
        pairs = zip(wanted, avals, strict=True)
        perturbed = tuple(w and split.is_floating(aval) for w, aval in pairs)
        passes = self.passes(perturbed, avals)
        if rules.has_any(self._program):
            return split.split(self.plain, avals, perturbed).residual_bytes
        return passes.halves.residual_bytes

    def passes(self, perturbed: tuple[bool, ...], avals: tuple[Any, ...]) -> Passes:
        """Returns both passes, planned once for each `(perturbed, avals)`.

        Args:
          perturbed: for the key (if any), the constants and the inputs, whether each is
            differentiated.
          avals: the type of each.

        Raises:
          PlanError: the planner has the choices of a plan, and none for the function.
          ValueError: a rule of the preset names no place.
        """
        case = perturbed, avals
        if case not in self._planned:
            before = len(self._planner.made)
            halves = split.split(self._with_bodies, avals, perturbed)
            pairs = zip(self._is_free, perturbed, strict=True)
            final = tuple(free for free, is_perturbed in pairs if is_perturbed)
            forms = self._planner.choose(
                halves,
                self._is_free,
                final,
                self._turns,
                is_recomputed=self._is_recomputed,
                scope=self._scope,
            )
            # JAX traces a loop's body again when it finds that one more carry is
            # differentiated: only the choices of the last trace count.
            made = self._planner.made
            tried, self._tried = self._tried, made[before:]
            made[:] = [choice for choice in made if choice not in tried]
            if not self._is_body:
                self._planner.check_rules()
            self._planned[case] = Passes(halves, forms, final)
        return self._planned[case]

    def forward(self, passes: Passes, arrays: Sequence[Any]) -> tuple[Any, Any]:
        """Returns the results, and the stored arrays by forward value."""
        key, _ = self._without_key(arrays)
        return rewrite.run_forward(passes, arrays, key)

    def _without_key(self, arrays: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
        return (arrays[0], arrays[1:]) if self._is_keyed else (None, arrays)

    def _with_bodies(self, *arrays: Any) -> Sequence[Any]:
        key, inputs = self._without_key(arrays)
        bodies = itertools.count()

        def drop_body(*args: Any, **kwargs: Any) -> PlannedFunction:
            own = None
            if key is not None:
                own = jax.random.fold_in(key, _FIRST_BODY + next(bodies))
            return self._drop_body(*args, key=own, **kwargs)

        return rules.run(self._program, inputs, drop_body)

    def _drop_body(
        self,
        traced: Any,
        is_free: Sequence[bool],
        *,
        key: Any,
        turns: int = 1,
        is_recomputed: bool = False,
    ) -> "PlannedFunction":
        return PlannedFunction(
            traced,
            self._planner,
            is_free,
            turns * self._turns,
            is_recomputed=is_recomputed or self._is_recomputed,
            is_body=True,
            key=key,
            scope="/".join(filter(None, (self._scope, compat.current_scope()))),
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _call(dropped: PlannedFunction, *arrays: Any) -> Sequence[Any]:
    return dropped.plain(*arrays)


def _forward(dropped: PlannedFunction, *primals: CustomVJPPrimal) -> tuple[Any, Any]:
    arrays = [primal.value for primal in primals]
    avals = tuple(map(jax.typeof, arrays))
    perturbed = tuple(
        primal.perturbed and split.is_floating(aval)
        for primal, aval in zip(primals, avals, strict=True)
    )
    passes = dropped.passes(perturbed, avals)
    results, stored = _run(functools.partial(dropped.forward, passes), arrays)
    inputs = {
        value: array
        for value, array in zip(passes.halves.forward.inputs, arrays, strict=True)
        if value in passes.read
    }
    return results, _Saved(passes, inputs, stored)


def _backward(
    dropped: PlannedFunction, saved: "_Saved", cotangents: Sequence[Any]
) -> Any:
    del dropped
    passes, halves = saved.passes, saved.passes.halves
    wanted = [c for c, yes in zip(cotangents, halves.floating, strict=True) if yes]
    is_zero = [isinstance(cotangent, SymbolicZero) for cotangent in wanted]
    backward, gone = zeros_lib.without_zeros(halves, is_zero)
    final = [f for f, zero in zip(passes.final, gone, strict=True) if not zero]
    given = [None if zero else c for c, zero in zip(wanted, is_zero, strict=True)]

    def run(inputs: Any, stored: Any, cotangents: Any) -> Any:
        return rewrite.run_backward(passes, backward, inputs, stored, cotangents, final)

    found = iter(_run(run, saved.inputs, saved.stored, given))
    zeros = iter(gone)
    return tuple(
        next(found) if is_perturbed and not next(zeros) else None
        for is_perturbed in halves.perturbed
    )


def _run(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function, under `jax.jit` where `jax_debug_nans` or `_infs` is set.

    Some operations of JAX, such as a variance, have NaNs inside that they do not
    return. Equations that run one by one would have these reported.
    """
    if jax.config.jax_debug_nans or jax.config.jax_debug_infs:
        function = jax.jit(function)
    return function(*args)


def _aval(x: Any) -> Any:
    return compat.open_jaxpr(jax.make_jaxpr(lambda x: x)(x)).invars[0].aval


_call.defvjp(_forward, _backward, symbolic_zeros=True)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("inputs", "stored"),
    meta_fields=("passes",),
)
@dataclasses.dataclass(frozen=True)
class _Saved:
    """The residuals of the `jax.custom_vjp`.

    Attributes:
      passes: the passes, which are static.
      inputs: the inputs that the backward pass reads, by forward value.
      stored: the stored arrays of other forward values.
    """

    passes: Passes
    inputs: dict[int, Any]
    stored: dict[int, Any]
