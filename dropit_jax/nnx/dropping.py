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
    """Returns `dropit_jax.drop` of a function whose arguments may be modules.

    State that the function changes, such as the statistics of `nnx.BatchNorm` and the
    counts of random streams, changes in the caller's modules, as with `nnx.remat`.
    `dropit_jax.plan` accepts the returned function, too.

    Args:
      fun: a function of modules and pytrees, such as a loss of a model and a batch.
      preset: as in `dropit_jax.drop`.
      rules: as in `dropit_jax.drop`.
      key: as in `dropit_jax.drop`.
      static_argnums: as in `dropit_jax.drop`.

    Raises:
      As `dropit_jax.drop`. The returned function passes keyword arguments by position;
      if it gets some, and `fun` has keyword-only ones, it raises a TypeError.
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
        """Returns a function of modules for a function of their pytrees."""

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

    settings = transform.settings_of(pure)
    assert settings is not None
    own = dataclasses.replace(settings, differentiable=_differentiable, lift=lift)
    transform.set_settings(dropped, own)
    return dropped


def _differentiable(trees: Any) -> Any:
    """Returns a pytree of booleans: whether `nnx.grad` may differentiate each leaf."""

    def of_variable(variable: Any) -> Any:
        may = not isinstance(variable, nnx.Variable) or isinstance(variable, nnx.Param)
        return jax.tree.map(lambda _: may, variable)

    return jax.tree.map(
        of_variable, trees, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )


def _positional(
    fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """Returns all arguments of a call by position, as Flax splits them.

    For `fun(model, batch, scale=2)` called as `fun(m, batch=b)`: `(m, b, 2)`. Without
    keyword arguments the call's own arguments are returned.

    Raises:
      TypeError: there are keyword arguments, and the function has keyword-only ones or
        takes some of them as `**kwargs`; or they do not fit the function.
    """
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
