"""Compares a loss and `dropit_jax.drop` of it: gradients, and memory on a GPU."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import dropit_jax
from dropit_jax import memory

PRESETS = ("exact", "lean", "leanest")

_MIB = 2**20

# Of the whole gradient in float32: what another order of the same sums makes of it.
_ROUNDING = 1e-5

Loss = Callable[..., Any]


def arguments(doc: str | None) -> argparse.Namespace:
    """The options of the command line, the same for all examples."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument(
        "--target", default="h100", help="the GPU to compile for; it need not be here"
    )
    return parser.parse_args()


def gradients(
    plain: Loss, dropped: Mapping[str, Loss], *args: Any, has_aux: bool = False
) -> None:
    """Prints how far the gradients of dropped losses are from those of the plain one.

    Args:
      plain: a loss, differentiated in its first argument.
      dropped: by preset, what `dropit_jax.drop` makes of it.
      *args: of the loss, in float32.
      has_aux: as in `jax.grad`.

    Raises:
      SystemExit: those of "exact" differ by more than rounding.
    """
    expected = _gradient(plain, args, has_aux)
    print(f"Loss on {jax.default_backend()}, small, float32.")
    rows, errors = [], {}
    for preset, loss in dropped.items():
        found = _gradient(loss, args, has_aux)
        difference = jax.tree.map(jnp.subtract, found, expected)
        errors[preset] = float(_norm(difference) / _norm(expected))
        rows.append((preset, f"{errors[preset]:.1e}"))
    _print_table(("preset", "error of the whole gradient"), rows)
    if not errors["exact"] <= _ROUNDING:
        raise SystemExit(f'"exact" is not exact: {errors["exact"]:.1e}')


def memory_table(
    plain: Loss,
    dropped: Mapping[str, Loss],
    *shapes: Any,
    target: str,
    has_aux: bool = False,
) -> None:
    """Prints what losses store, and what their gradients allocate on a GPU.

    Args:
      plain: a loss, differentiated in its first argument.
      dropped: by preset, what `dropit_jax.drop` makes of it.
      *shapes: arguments of the loss; `jax.ShapeDtypeStruct`s will do.
      target: one of `memory.targets()`.
      has_aux: as in `jax.grad`.
    """
    plans = {preset: dropit_jax.plan(loss)(*shapes) for preset, loss in dropped.items()}
    stored = {"plain": plans["exact"].plain_bytes}
    stored |= {preset: plan.nbytes for preset, plan in plans.items()}
    columns = {"stored MiB": stored}
    try:
        columns[f"temp MiB on {target}"] = {
            preset: memory.compile_report(
                jax.grad(loss, has_aux=has_aux), *shapes, target=target
            ).temp_bytes
            for preset, loss in {"plain": plain, **dropped}.items()
        }
    except memory.CompilerMissingError as error:
        print(error)
    header = ["preset", *(word for name in columns for word in (name, "ratio"))]
    rows = [
        [
            preset,
            *(cell for sizes in columns.values() for cell in _cells(sizes, preset)),
        ]
        for preset in stored
    ]
    _print_table(header, rows)


def _gradient(loss: Loss, args: tuple[Any, ...], has_aux: bool) -> Any:
    found = jax.jit(jax.grad(loss, has_aux=has_aux))(*args)
    return found[0] if has_aux else found


def _norm(tree: Any) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))


def _cells(sizes: Mapping[str, int], preset: str) -> tuple[str, str]:
    return f"{sizes[preset] / _MIB:,.0f}", f"{sizes[preset] / sizes['plain']:.3f}"


def _print_table(header: Any, rows: Any) -> None:
    """Prints a table in Markdown."""
    for row in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(row)} |")
    print()
