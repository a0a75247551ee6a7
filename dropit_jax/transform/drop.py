"""`drop` and `plan`: the transformation as users call it, and its report."""

import dataclasses
import functools
import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dropit_jax.transform import plan as plans
from dropit_jax.transform.differentiate import PlannedFunction
from dropit_jax.transform.forms import presets
from dropit_jax.transform.forms.presets import Preset
from dropit_jax.transform.plan import Plan
from dropit_jax.transform.planning.planner import Choices, Planner


def drop(
    fun: Callable[..., Any],
    preset: str | Preset | Plan = "lean",
    *,
    rules: Mapping[str, Any] | None = None,
    key: str | None = None,
    static_argnums: int | Sequence[int] = (),
) -> Callable[..., Any]:
    """Returns a function with the results of `fun` that stores fewer residual bytes.

    Each call traces `fun`, which therefore cannot branch in Python on elements of
    arrays. The returned function can be differentiated in reverse mode, also by values
    that `fun` closes over; twice only if no residual is stored in a lossy form.

    Args:
      fun: a function of pytrees. Leaves that are no arrays reach it unchanged.
      preset: how residuals are stored: "exact", "dropit", "lean", "leanest", a result
        of `preset(...)`, or a plan that `plan` made of the same function.
      rules: presets for named places, as in `Preset`; they replace the preset's own.
      key: the name of the argument that holds a PRNG key, for policies that draw random
        numbers. The caller passes a new key in every step.
      static_argnums: positions of arguments that reach `fun` unchanged, also the arrays
        in them.

    Raises:
      TypeError: `fun`, `preset` or `rules` has the wrong type. When differentiated
        twice: a residual is stored in a lossy form.
      ValueError: the preset does not exist, its policy needs a key, or `rules` are
        given with a plan. When called: `static_argnums` names no argument, or a
        policy needs a key and `key` names no PRNG key. When differentiated: a rule
        names no place of the function.
      PlanError: when differentiated, if the plan belongs to another function or to
        arguments of other types.
    """
    own = Settings.of(fun, preset, rules, key, static_argnums)

    @functools.wraps(fun)
    def dropped(*args: Any, **kwargs: Any) -> Any:
        call = _Call.of(own, args, kwargs)
        run = PlannedFunction(
            call.traced, own.planner(), [True] * len(call.arrays), key=call.key
        )
        return jax.tree.unflatten(call.results, run(*call.arrays))

    set_settings(dropped, own)
    return dropped


def set_settings(dropped: Callable[..., Any], settings: "Settings") -> None:
    """Sets the settings of a dropped function, which `settings_of` returns."""
    owner: Any = dropped
    owner.dropit_settings = settings, weakref.ref(dropped)


def settings_of(fun: Any) -> "Settings | None":
    """Returns the settings of a dropped function, jitted or not; `None` for others.

    `functools.wraps` copies the attribute to functions that call a dropped one.
    """
    is_jitted = isinstance(fun, jax.stages.Wrapped)
    own = getattr(fun, "__wrapped__", None) if is_jitted else fun
    settings, owner = getattr(own, "dropit_settings", (None, lambda: None))
    return settings if owner() is own else None


def plan(
    fun: Callable[..., Any],
    preset: str | Preset | Plan | None = None,
    argnums: int | Sequence[int] = 0,
    *,
    rules: Mapping[str, Any] | None = None,
    key: str | None = None,
) -> Callable[..., Plan]:
    """Returns a function of the arguments of `fun` that returns its `Plan`.

    The returned function only traces: it computes and allocates nothing.

    Args:
      fun: a function that `drop` takes, or one that `drop` returned.
      preset: as in `drop`; `None` takes the preset of a dropped function, else "lean".
      argnums: positions of the arguments that are differentiated. Integer arrays, and
        leaves that are no arrays, count as not differentiated.
      rules: as in `drop`; `None` takes the rules of the preset.
      key: as in `drop`; `None` takes the key of a dropped function.

    Returns:
      A function of arrays or `jax.ShapeDtypeStruct`s.

    Raises:
      As `drop`. When called: the errors of a call and of a derivative; ValueError if
      `argnums` names no argument; PlanError if a loop or a conditional of `fun` takes a
      mutable reference.
    """
    of = settings_of(fun) or Settings.of(fun, "lean")
    own = dataclasses.replace(
        Settings.of(of.fun, preset or of.given, rules, key or of.key, of.static),
        differentiable=of.differentiable,
        lift=of.lift,
    )
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    @functools.wraps(own.fun)
    def planned(*args: Any, **kwargs: Any) -> Plan:
        _check_places("argnums", numbers, len(args))
        wanted = {place % len(args) for place in numbers}
        call = _Call.of(own, args, kwargs)
        planner = own.planner()
        run = PlannedFunction(
            call.traced, planner, [True] * len(call.arrays), key=call.key
        )
        is_perturbed = [place in wanted for place in call.argument]
        plain = run.plan(is_perturbed)
        return plans.from_choices(planner.preset, planner.made, plain)

    return planned if own.lift is None else own.lift(planned)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The checked arguments of `drop`.

    Attributes:
      fun: the plain function.
      given: the plan that the user passed, or else the preset with its rules.
      preset: the preset with its rules, also where the user passed a plan.
      choices: the forms of the stored values of the plan; `None` without a plan.
      key: the name of the argument that holds the PRNG key.
      static: the positions of the static arguments.
      differentiable: maps `(args, kwargs)` to a pytree of booleans of the same
        structure: whether a leaf may be differentiated. `None`: all leaves may.
      lift: converts a function of the arguments of `fun` to a function of the user's
        arguments; `None`: they are the same.
    """

    fun: Callable[..., Any]
    given: Preset | Plan
    preset: Preset
    choices: Choices | None
    key: str | None
    static: tuple[int, ...]
    differentiable: Callable[[Any], Any] | None = None
    lift: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None

    @classmethod
    def of(
        cls,
        fun: Callable[..., Any],
        given: str | Preset | Plan,
        rules: Mapping[str, Any] | None = None,
        key: str | None = None,
        static: int | Sequence[int] = (),
    ) -> "Settings":
        """Returns the settings of a call of `drop`.

        Raises:
          As `drop`, before it is called.
        """
        if not callable(fun):
            raise TypeError(f"drop takes a function, got {fun!r}.")
        chosen, choices = given, None
        if isinstance(given, Plan):
            chosen, choices = given.preset, given.forms
            if rules is not None:
                raise ValueError(
                    "A plan has its own rules: give rules to dropit_jax.plan."
                )
        elif isinstance(given, str):
            chosen = presets.preset(given)
        if not isinstance(chosen, Preset):
            raise TypeError(
                f"drop takes the name of a preset, a Preset or a Plan, got {given!r}."
            )
        if rules is not None:
            chosen = dataclasses.replace(chosen, rules=rules)
        if chosen.needs_key and key is None:
            raise ValueError(
                f"The preset {chosen.name!r} has a policy that draws random numbers: "
                "name the argument that brings a PRNG key, another one in every step, "
                "as in drop(loss, preset, key='rng')."
            )
        places = (static,) if isinstance(static, int) else tuple(static)
        kept = given if isinstance(given, Plan) else chosen
        return cls(fun, kept, chosen, choices, key, places)

    def planner(self) -> Planner:
        """Returns a new planner, for one trace of the function."""
        return Planner(self.preset, self.choices)


def _check_places(field: str, places: Sequence[int], count: int) -> None:
    for place in places:
        if not -count <= place < count:
            raise ValueError(
                f"{field}={place}: there are {count} positional arguments."
            )


@dataclasses.dataclass(frozen=True)
class _Call:
    """A traced call of a function.

    Attributes:
      traced: the function of `arrays` alone.
      arrays: the array leaves of the arguments that are not static.
      argument: for each array, the position of its argument; -1 for a keyword argument
        and for an array that may not be differentiated.
      results: the tree structure of the function's result.
      key: the PRNG key among the arguments; `None` where no policy needs it.
    """

    traced: Any
    arrays: list[Any]
    argument: list[int]
    results: Any
    key: Any

    @classmethod
    def of(
        cls, own: Settings, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> "_Call":
        """Traces the function for these arguments."""
        fun = own.fun
        _check_places("static_argnums", own.static, len(args))
        kept = {place % len(args) for place in own.static}
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
        if own.differentiable is not None:
            may = jax.tree.leaves(own.differentiable((given, kwargs)))
            argument = [
                place if may[i] else -1
                for i, place in zip(places, argument, strict=True)
            ]
        key = _key(own, args, kwargs) if own.preset.needs_key else None
        return cls(traced, arrays, argument, results, key)


def _key(own: Settings, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Returns the PRNG key that the argument `own.key` holds.

    Raises:
      ValueError: there is no such argument, or it is no PRNG key.
    """
    bound = inspect.signature(own.fun).bind(*args, **kwargs)
    given = dict(bound.arguments) | bound.kwargs
    found: Any = given.get(str(own.key))
    if _is_key(found):
        return found
    names = ", ".join(map(repr, given)) or "none"
    problem = "of another type" if str(own.key) in given else "not there"
    raise ValueError(
        f"key={own.key!r} has to name an argument that is a PRNG key, and this one is "
        f"{problem}; the arguments are {names}."
    )


def _is_key(x: Any) -> bool:
    """Returns whether `x` is one PRNG key: typed, or a legacy `uint32[2]`."""
    if not _is_array(x):
        return False
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return not x.shape
    return bool(x.shape == (2,) and x.dtype == jnp.uint32)


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")
