"""What `intercept` tells of a model: what caches less, what does not, and why.

Both are records, which an `Interception` lists and which it prints as one table.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dropit_jax.linen import functions


@dataclasses.dataclass(frozen=True)
class InterceptedLayer:
    """What DropIT or a preset does to a layer or a function.

    Attributes:
      path: the layer's, its names joined by "/"; of a function, that of the module in
        whose call it is called.
      kind: the name of its class; of a function, its own.
      shape: of the input that it caches; of attention, of the query.
      dtype: of that input.
      bytes_before: what plain Flax caches in one call, in bytes: the input; of
        attention all that its core caches, of dropout the mask.
      bytes_after: what DropIT, or the compact twin, caches of it.
      shared_with: the path of an earlier layer that reads the same input and caches it
        for both; then this one's bytes are 0. `None` elsewhere.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    dtype: jax.typing.DTypeLike
    bytes_before: int
    bytes_after: int
    shared_with: str | None = None


class Unreached(NamedTuple):
    """Something that a preset has a compact twin for, or seems to, and left alone.

    Attributes:
      path: as in `InterceptedLayer`.
      what: the name of a class or a function.
      why: what is in the way.
    """

    path: str
    what: str
    why: str


def total_bytes(layers: Sequence[InterceptedLayer]) -> tuple[int, int]:
    """What layers cache in all: in plain Flax, and as they are."""
    before = sum(layer.bytes_before for layer in layers)
    return before, sum(layer.bytes_after for layer in layers)


def table(layers: Sequence[InterceptedLayer], unreached: Sequence[Unreached]) -> str:
    """A line for each of them, and one for the total of the layers."""
    rows = [("layer", "kind", "input", "before", "after")]
    for layer in layers:
        size = f"{jnp.dtype(layer.dtype).name}{list(layer.shape)}"
        kept = f"{layer.bytes_after:,}"
        if layer.shared_with is not None:
            kept = f"shared with {layer.shared_with}"
        cells = (layer.kind, size, f"{layer.bytes_before:,}", kept)
        rows.append((layer.path or ".", *cells))
    called = sum(layer.kind in functions.NAMES for layer in layers)
    count = f"{len(layers) - called} layers"
    count += f", {called} functions" if called else ""
    before, after = total_bytes(layers)
    rows.append((f"{count}, bytes", "", "", f"{before:,}", f"{after:,}"))
    lines = _aligned(rows)
    if unreached:
        missed = [(m.path or ".", m.what, m.why) for m in unreached]
        lines += ["", *_aligned([("not reached", "", "why"), *missed])]
    return "\n".join(lines)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines whose cells stand below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))
        for row in rows
    )
    return [line.rstrip() for line in lines]
