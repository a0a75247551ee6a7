"""The residuals of a function: arrays that its backward pass reads."""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dropit_jax.compat import Jaxpr, Var, dce_jaxpr, open_jaxpr
from dropit_jax.memory.traced import origins, scopes


@dataclasses.dataclass(frozen=True)
class SavedResidual:
    """An array that the backward pass reads.

    Attributes:
      shape: of the array.
      dtype: of the array.
      nbytes: of the array.
      layer: the path of the Flax module that makes it; the model's name for what it
        makes itself, "" for what is made outside of it.
      kind: the name that `jax.ad_checkpoint.checkpoint_name` gave it, as the operations
        of this library name what they cache, or else the primitive that makes it;
        "argument" for an argument, "constant" for what depends on none.
    """

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    layer: str
    kind: str

    @property
    def is_cached(self) -> bool:
        """Whether it takes memory that would not be taken anyway."""
        return self.kind not in (origins.ARGUMENT, origins.CONSTANT)


@dataclasses.dataclass(frozen=True)
class SavedResiduals:
    """The residuals of a function; printed, a table.

    Attributes:
      residuals: the arrays that the backward pass reads, largest first.
    """

    residuals: tuple[SavedResidual, ...]

    @property
    def total_bytes(self) -> int:
        """The size of all, but for arguments and constants."""
        return sum(each.nbytes for each in self.residuals if each.is_cached)

    @property
    def by_kind(self) -> dict[str, int]:
        """The parts of `total_bytes`, largest first."""
        sizes: collections.Counter[str] = collections.Counter()
        for each in self.residuals:
            if each.is_cached:
                sizes[each.kind] += each.nbytes
        return dict(sizes.most_common())

    def __str__(self) -> str:
        rows = [("bytes", "type", "kind", "layer")]
        for each in self.residuals:
            shape = ",".join(map(str, each.shape))
            kind = each.kind if each.is_cached else f"({each.kind})"
            rows.append(
                (f"{each.nbytes:,}", f"{each.dtype}[{shape}]", kind, each.layer)
            )
        rows += [(f"{size:,}", "", kind, "") for kind, size in self.by_kind.items()]
        rows.append((f"{self.total_bytes:,}", "", "total", ""))
        return _table(rows, rules=(1, 1 + len(self.residuals), len(rows) - 1))


def saved_residuals(fn: Callable[..., Any], *args: Any) -> SavedResiduals:
    """The residuals of a function: arrays that its backward pass reads.

    That is what `jax.grad` keeps before any compiler looks at it: XLA computes some of
    it anew instead, and adds workspace. Nothing runs and nothing is allocated.

    Args:
      fn: a function, such as a loss. It is differentiated by all arguments of floating
        point.
      *args: its arguments, as arrays or `jax.ShapeDtypeStruct`s.
    """
    leaves, structure = jax.tree.flatten(args)
    given = [i for i, leaf in enumerate(leaves) if _is_floating(leaf)]
    if not given:
        return SavedResiduals(())
    pullback = _Pullback()

    def forward(*leaves: Any) -> list[Any]:
        def of_given(*values: Any) -> Any:
            replaced = dict(enumerate(leaves)) | dict(zip(given, values, strict=True))
            return fn(*jax.tree.unflatten(structure, replaced.values()))

        return pullback.take_apart(*jax.vjp(of_given, *[leaves[i] for i in given]))

    jaxpr = open_jaxpr(jax.make_jaxpr(forward)(*leaves))
    backward = pullback.traced([variable.aval for variable in jaxpr.outvars])
    return between(jaxpr, backward, len(jaxpr.outvars))


def between(forward: Jaxpr, backward: Jaxpr, count: int) -> SavedResiduals:
    """The residuals between two passes.

    Args:
      forward: returns the residuals last.
      backward: takes them first.
      count: of the residuals that one gives to the other.
    """
    _, used = dce_jaxpr(backward, [True] * len(backward.outvars))
    given = forward.outvars[len(forward.outvars) - count :]
    read = [
        variable
        for variable, is_read in zip(given, used[:count], strict=True)
        if is_read and isinstance(variable, Var)
    ]
    found: dict[tuple[int, ...], SavedResidual] = {}
    for variable, origin in zip(read, origins.find(read, forward), strict=True):
        if origin.name or origin.key not in found:  # a name may be on one use only
            found[origin.key] = _residual(variable, origin)
    ordered = sorted(found.values(), key=lambda each: each.nbytes, reverse=True)
    return SavedResiduals(tuple(ordered))


class _Pullback:
    """A pullback, as a function of residuals and cotangents."""

    def take_apart(self, result: Any, pullback: Any) -> list[Any]:
        """The residuals of a pullback, given also the function's result."""
        residuals, self._structure = jax.tree.flatten(pullback)
        self._cotangents = jax.tree.map(jax.typeof, result)
        return residuals

    def traced(self, avals: Sequence[Any]) -> Jaxpr:
        """The backward pass, of residuals of these types and of cotangents."""
        return open_jaxpr(jax.make_jaxpr(self._call)(avals, self._floating()))

    def _floating(self) -> list[Any]:
        return [
            aval for aval in jax.tree.leaves(self._cotangents) if _is_floating(aval)
        ]

    def _call(self, residuals: Sequence[Any], cotangents: Sequence[Any]) -> Any:
        given = iter(cotangents)
        complete = jax.tree.map(
            lambda aval: (
                next(given)
                if _is_floating(aval)
                else np.zeros(aval.shape, jax.dtypes.float0)
            ),
            self._cotangents,
        )
        return jax.tree.unflatten(self._structure, residuals)(complete)


def _is_floating(leaf: Any) -> bool:
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    return bool(jnp.issubdtype(dtype, jnp.inexact))


def _residual(variable: Var, origin: origins.Origin) -> SavedResidual:
    is_there = origin.primitive in (origins.ARGUMENT, origins.CONSTANT)
    # What is read of an argument may be a view of it.
    aval: Any = origin.aval if is_there else variable.aval
    return SavedResidual(
        shape=tuple(aval.shape),
        dtype=str(aval.dtype),
        nbytes=math.prod(aval.shape) * aval.dtype.itemsize,
        layer=scopes.layer(origin.path),
        kind=origin.primitive if is_there else origin.name or origin.primitive,
    )


def _table(rows: Sequence[tuple[str, ...]], rules: Sequence[int]) -> str:
    """Aligned columns, the first to the right, with rules before some of the rows."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for i, (first, *others) in enumerate(rows):
        if i in rules:
            lines.append("-" * (sum(widths) + 2 * (len(widths) - 1)))
        cells = [
            cell.ljust(width) for cell, width in zip(others, widths[1:], strict=True)
        ]
        lines.append("  ".join([first.rjust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)
