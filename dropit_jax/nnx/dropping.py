"""`drop` for functions of `flax.nnx` modules."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from dropit_jax import compat
from dropit_jax.transform import drop as transform
from dropit_jax.transform.forms.presets import Preset
from dropit_jax.transform.plan import Plan

_TAG = "drop"


def drop(
    fun: Callable[..., Any],
    preset: str | Preset | Plan = "lean",
    *,
    rules: Mapping[str, Any] | None = None,
    key: str | None = None,
    static_argnums: int | Sequence[int] = (),
) -> Callable[..., Any]:
    """`dropit_jax.drop` for a function whose arguments may be modules.

    State that the function changes, such as the statistics of `nnx.BatchNorm` and the
    counts of random streams, is changed in the modules of the caller, as by
    `nnx.remat`. `dropit_jax.plan` takes the returned function as it takes others.

    Args:
      fun: a function of modules and pytrees, such as a loss of a model and a batch.
      preset: as of `dropit_jax.drop`.
      rules: likewise.
      key: likewise.
      static_argnums: likewise.

    Raises:
      As `dropit_jax.drop`.
    """

    @functools.wraps(fun)
    def of_trees(*trees: Any) -> Any:
        args = nnx.from_tree(trees, ctxtag=_TAG, is_inner=True)
        out = fun(*args)
        changed = compat.flax_modules(args)
        return nnx.to_tree((changed, out), ctxtag=_TAG)

    pure = transform.drop(
        of_trees, preset, rules=rules, key=key, static_argnums=static_argnums
    )

    def lift(run: Callable[..., Any]) -> Callable[..., Any]:
        """A function of trees as one of modules."""

        @functools.wraps(fun)
        def lifted(*args: Any, **kwargs: Any) -> Any:
            with nnx.update_context(_TAG):
                trees = nnx.to_tree(_positional(fun, args, kwargs), ctxtag=_TAG)
                return run(*trees)

        return lifted

    @lift
    def dropped(*trees: Any) -> Any:
        _, out = nnx.from_tree(pure(*trees), ctxtag=_TAG, is_inner=False)
        return out

    own = pure.dropit_settings  # type: ignore[attr-defined]
    dropped.dropit_settings = dataclasses.replace(  # type: ignore[attr-defined]
        own, differentiable=_differentiable, lift=lift
    )
    return dropped


def _differentiable(trees: Any) -> Any:
    """Whether `nnx.grad` differentiates each leaf, as a tree."""

    def of_variable(variable: Any) -> Any:
        may = not isinstance(variable, nnx.Variable) or isinstance(variable, nnx.Param)
        return jax.tree.map(lambda _: may, variable)

    return jax.tree.map(
        of_variable, trees, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )


def _positional(
    fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """The arguments in their places, as Flax splits them."""
    if not kwargs:
        return args
    bound = inspect.signature(fun).bind(*args, **kwargs)
    bound.apply_defaults()
    if bound.kwargs:
        raise TypeError(
            f"nnx.drop takes {', '.join(bound.kwargs)} by position: arguments that are "
            "modules have places."
        )
    return bound.args
