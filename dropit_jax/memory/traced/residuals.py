"""Lists the residuals of a function: the arrays that its backward pass reads."""

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
      shape: the shape of the array.
      dtype: the dtype of the array.
      nbytes: the size of the array, in bytes.
      layer: the path of the Flax module that computes the array; the model's name if
        no submodule does, "" if the array is computed outside the model.
      kind: the array's name from `jax.ad_checkpoint.checkpoint_name` (the operations of
        this library name their residuals), or else the primitive that computes it;
        "argument" for an argument, "constant" for an array that depends on no argument.
    """

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    layer: str
    kind: str

    @property
    def adds_memory(self) -> bool:
        """Whether the array takes memory: it is no argument and no constant."""
        return self.kind not in (origins.ARGUMENT, origins.CONSTANT)


@dataclasses.dataclass(frozen=True)
class SavedResiduals:
    """The residuals of a function; `str` returns a table of them.

    Attributes:
      residuals: the arrays that the backward pass reads, largest first.
    """

    residuals: tuple[SavedResidual, ...]

    @property
    def total_bytes(self) -> int:
        """The bytes of all residuals except arguments and constants."""
        return sum(each.nbytes for each in self.residuals if each.adds_memory)

    @property
    def by_kind(self) -> dict[str, int]:
        """The parts of `total_bytes` by `SavedResidual.kind`, largest first."""
        sizes: collections.Counter[str] = collections.Counter()
        for each in self.residuals:
            if each.adds_memory:
                sizes[each.kind] += each.nbytes
        return dict(sizes.most_common())

    def __str__(self) -> str:
        rows = [("bytes", "type", "kind", "layer")]
        for each in self.residuals:
            shape = ",".join(map(str, each.shape))
            kind = each.kind if each.adds_memory else f"({each.kind})"
            rows.append(
                (f"{each.nbytes:,}", f"{each.dtype}[{shape}]", kind, each.layer)
            )
        rows += [(f"{size:,}", "", kind, "") for kind, size in self.by_kind.items()]
        rows.append((f"{self.total_bytes:,}", "", "total", ""))
        return _table(rows, rules=(1, 1 + len(self.residuals), len(rows) - 1))


def saved_residuals(fn: Callable[..., Any], *args: Any) -> SavedResiduals:
    """Returns the residuals of a function: the arrays that its backward pass reads.

    They are the residuals of `jax.grad` before compilation: XLA recomputes some of
    them, and adds workspaces. Only traces `fn`: nothing is executed or allocated.

    Args:
      fn: a function, such as a loss. It is differentiated with respect to all
        floating-point and complex arguments.
      *args: the arguments of `fn`, as arrays or `jax.ShapeDtypeStruct`s.
    """
    leaves, structure = jax.tree.flatten(args)
    floating = [i for i, leaf in enumerate(leaves) if _is_floating(leaf)]
    if not floating:
        return SavedResiduals(())
    pullback = _Pullback()

    def forward(*leaves: Any) -> list[Any]:
        def of_floating(*values: Any) -> Any:
            replaced = dict(enumerate(leaves)) | dict(
                zip(floating, values, strict=True)
            )
            return fn(*jax.tree.unflatten(structure, replaced.values()))

        return pullback.flatten(*jax.vjp(of_floating, *[leaves[i] for i in floating]))

    jaxpr = open_jaxpr(jax.make_jaxpr(forward)(*leaves))
    backward = pullback.trace([variable.aval for variable in jaxpr.outvars])
    return residuals_between(jaxpr, backward, len(jaxpr.outvars))


def residuals_between(forward: Jaxpr, backward: Jaxpr, count: int) -> SavedResiduals:
    """Returns the residuals that a forward pass hands to a backward pass.

    Args:
      forward: the jaxpr of the forward pass; its last `count` results are residuals.
      backward: the jaxpr of the backward pass; its first `count` inputs are residuals.
      count: the number of residuals.
    """
    _, used = dce_jaxpr(backward, [True] * len(backward.outvars))
    given = forward.outvars[len(forward.outvars) - count :]
    read = [
        variable
        for variable, is_read in zip(given, used[:count], strict=True)
        if is_read and isinstance(variable, Var)
    ]
    found: dict[tuple[int, ...], SavedResidual] = {}
    for variable, origin in zip(read, origins.find_origins(read, forward), strict=True):
        if origin.name or origin.key not in found:  # one use alone may be named
            found[origin.key] = _residual(variable, origin)
    ordered = sorted(found.values(), key=lambda each: each.nbytes, reverse=True)
    return SavedResiduals(tuple(ordered))


class _Pullback:
    """A pullback of `jax.vjp`, as a function of its residuals and of cotangents."""

    def flatten(self, result: Any, pullback: Any) -> list[Any]:
        """Returns the residuals of a pullback, given both results of `jax.vjp`."""
        residuals, self._structure = jax.tree.flatten(pullback)
        self._cotangents = jax.tree.map(jax.typeof, result)
        return residuals

    def trace(self, avals: Sequence[Any]) -> Jaxpr:
        """Returns the jaxpr of the backward pass for residuals of these avals."""
        return open_jaxpr(jax.make_jaxpr(self._call)(avals, self._cotangent_avals()))

    def _cotangent_avals(self) -> list[Any]:
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
    is_given = origin.primitive in (origins.ARGUMENT, origins.CONSTANT)
    # The variable may be a view of the argument, such as a reshape.
    aval: Any = origin.aval if is_given else variable.aval
    return SavedResidual(
        shape=tuple(aval.shape),
        dtype=str(aval.dtype),
        nbytes=math.prod(aval.shape) * aval.dtype.itemsize,
        layer=scopes.layer_of(origin.path),
        kind=origin.primitive if is_given else origin.name or origin.primitive,
    )


def _table(rows: Sequence[tuple[str, ...]], rules: Sequence[int]) -> str:
    """Returns a text table: first column flush right, rules above some of the rows."""
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
