"""Finds the largest batch that a GPU has the memory for."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dropit_jax.memory.compiled import search
from dropit_jax.memory.compiled.devices import TargetError, device_bytes
from dropit_jax.memory.compiled.report import CompileReport, compile_report
from dropit_jax.memory.compiled.toolchain import CompilerError

# A step, its abstract arguments, and the arguments whose memory it may take over.
Step = tuple[Callable[..., Any], Sequence[Any], int | Sequence[int]]


class NoBatchFitsError(ValueError):
    """Even the smallest batch takes more memory than there is."""


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """The largest batch that fits.

    Attributes:
      batch: its size.
      report: what its step takes; `peak_bytes` is what has to fit.
      available_bytes: what it has to fit into.
    """

    batch: int
    report: CompileReport
    available_bytes: int


def max_batch(
    make_step: Callable[[int], Step],
    target: str | Path,
    *,
    multiple_of: int = 1,
    fraction: float = 0.75,
    upper: int = 2**20,
) -> BatchPlan:
    """Finds the largest batch whose training step fits into the memory of a GPU.

    Steps are compiled for the GPU, which need not be present, with different batches:
    about five if their memory grows evenly. The answer was compiled and fits, and the
    next batch was compiled and does not. (XLA packs some batches of a large model one
    percent tighter than the next, so a larger one still may fit, and the last few of
    many hundred take more looks: let the batch be a multiple of something.)

    Args:
      make_step: of a batch size, a function, its abstract arguments, and what
        `compile_report` takes as `donate`.
      target: the GPU, as of `compile_report`.
      multiple_of: what the batch is to be a multiple of.
      fraction: how much of the GPU's memory may be used. JAX takes three quarters
        of it when it starts, unless XLA_PYTHON_CLIENT_MEM_FRACTION tells otherwise.
        (A step that takes about as much or more XLA makes smaller, if it can, by
        computing some values twice.)
      upper: a batch not to exceed: if it fits, nothing larger is tried.

    Raises:
      NoBatchFitsError: a batch of `multiple_of` does not fit.
      TargetError: the target is unknown, `None`, or of unknown memory.
      CompilerError: as `compile_report`, with a note that tells the batch.
      ValueError: one of the numbers is out of range.
    """
    if target is None:
        raise TargetError("The local backend's memory is not known: name a target.")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1], is {fraction}.")
    if not 1 <= multiple_of <= upper:
        raise ValueError(f"multiple_of must lie in [1, {upper}], is {multiple_of}.")
    available = int(device_bytes(target) * fraction)
    reports: dict[int, CompileReport] = {}

    def peak_bytes(multiple: int) -> int:
        batch = multiple * multiple_of
        reports[batch] = _report(make_step, batch, target)
        return reports[batch].peak_bytes

    batch = multiple_of * search.largest(peak_bytes, available, upper // multiple_of)
    if batch == 0:
        needed = reports[multiple_of].peak_bytes
        raise NoBatchFitsError(
            f"A batch of {multiple_of} takes {needed:,} bytes; {fraction} of the "
            f"memory of {target} is {available:,}."
        )
    return BatchPlan(batch, reports[batch], available)


def _report(
    make_step: Callable[[int], Step], batch: int, target: str | Path
) -> CompileReport:
    step, abstract_args, donate = make_step(batch)
    try:
        return compile_report(step, *abstract_args, target=target, donate=donate)
    except CompilerError as error:
        error.add_note(f"This was with a batch of {batch}.")
        raise
