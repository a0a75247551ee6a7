"""`drop`: a function that stores less between its forward and its backward pass."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from dropit_jax.transform import plan as plans
from dropit_jax.transform import presets
from dropit_jax.transform.differentiate import Dropped
from dropit_jax.transform.plan import Plan
from dropit_jax.transform.planner import Planner
from dropit_jax.transform.presets import Preset


def drop(
    fun: Callable[..., Any],
    preset: str | Preset | Plan = "lean",
    *,
    static_argnums: int | Sequence[int] = (),
) -> Callable[..., Any]:
    """A function that returns what `fun` does, and stores less for its gradient.

    Not differentiated, it is `fun`. Like `jax.checkpoint` it is differentiated in
    reverse mode, once; what `fun` closes over may be differentiated too.

    Args:
      fun: a function of pytrees. Leaves that are no arrays are given to it as they are.
      preset: what is stored, and how: "exact", "lean", "leanest", one of `preset(...)`,
        or a plan that `plan` made of the same function.
      static_argnums: arguments that are given to `fun` as they are, arrays in them too.

    Raises:
      ValueError: there is no such preset; when called, there is no such argument.
      PlanError: when called; the plan is of another function, or of other arguments.
    """
    chosen, choices = _chosen(preset)
    static = (static_argnums,) if isinstance(static_argnums, int) else static_argnums

    @functools.wraps(fun)
    def dropped(*args: Any, **kwargs: Any) -> Any:
        call = _Call.of(fun, args, kwargs, static)
        run = Dropped(call.traced, Planner(chosen, choices), [True] * len(call.arrays))
        return jax.tree.unflatten(call.results, run(*call.arrays))

    dropped.dropit = preset, static  # type: ignore[attr-defined]
    return dropped


def plan(
    fun: Callable[..., Any],
    preset: str | Preset | None = None,
    argnums: int | Sequence[int] = 0,
) -> Callable[..., Plan]:
    """A function of the arguments of `fun` that returns what is stored, and how.

    Nothing is computed and nothing is allocated.

    Args:
      fun: a function, as `drop` takes it, or one that `drop` returned.
      preset: as of `drop`; `None`: that of a dropped function, else "lean".
      argnums: the arguments that are differentiated.

    Returns:
      A function of arrays or `jax.ShapeDtypeStruct`s.
    """
    own, static = getattr(fun, "dropit", (None, ()))
    plain = fun if own is None else fun.__wrapped__  # type: ignore[attr-defined]
    chosen, choices = _chosen(preset or own or "lean")
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    @functools.wraps(plain)
    def planned(*args: Any, **kwargs: Any) -> Plan:
        call = _Call.of(plain, args, kwargs, static)
        planner = Planner(chosen, choices)
        run = Dropped(call.traced, planner, [True] * len(call.arrays))
        run.plan([place in numbers for place in call.argument])
        return plans.of_choices(chosen, planner.made)

    return planned


def _chosen(preset: str | Preset | Plan) -> tuple[Preset, Any]:
    """The preset, and the choices that are made already, if any."""
    if isinstance(preset, Plan):
        return preset.preset, preset.forms
    if isinstance(preset, Preset):
        return preset, None
    return presets.preset(preset), None


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of a function, traced.

    Attributes:
      traced: the function of the arrays alone.
      arrays: the leaves of the arguments that are arrays.
      argument: of each array, the position of its argument; -1: a keyword.
      results: the structure of what the function returns.
    """

    traced: Any
    arrays: list[Any]
    argument: list[int]
    results: Any

    @classmethod
    def of(
        cls,
        fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        static: Sequence[int],
    ) -> "_Call":
        """Traces a function for these arguments."""
        for place in static:
            if not -len(args) <= place < len(args):
                raise ValueError(
                    f"static_argnums={place}: there are {len(args)} positional "
                    "arguments."
                )
        kept = {place % len(args) for place in static}
        given = [None if place in kept else arg for place, arg in enumerate(args)]
        leaves, structure = jax.tree.flatten((given, kwargs))
        places = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]
        results: Any = None

        def flat(*arrays: Any) -> list[Any]:
            nonlocal results
            replaced = dict(enumerate(leaves)) | dict(zip(places, arrays, strict=True))
            given, kwargs = jax.tree.unflatten(structure, replaced.values())
            complete = [
                args[place] if place in kept else arg for place, arg in enumerate(given)
            ]
            found, results = jax.tree.flatten(fun(*complete, **kwargs))
            return found

        arrays = [leaves[i] for i in places]
        traced = jax.make_jaxpr(flat)(*arrays)
        sizes = [len(jax.tree.leaves(arg)) for arg in given]
        owners = [place for place, size in enumerate(sizes) for _ in range(size)]
        argument = [owners[i] if i < len(owners) else -1 for i in places]
        return cls(traced, arrays, argument, results)


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")
