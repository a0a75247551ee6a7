"""Finds the largest batch that fits into the memory of a GPU."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dropit_jax.memory.compiled import search
from dropit_jax.memory.compiled.devices import TargetError, device_bytes
from dropit_jax.memory.compiled.report import CompileReport, compile_report
from dropit_jax.memory.compiled.toolchain import CompilerError

# A step, its abstract arguments, and the indices of the donated arguments.
Step = tuple[Callable[..., Any], Sequence[Any], int | Sequence[int]]


class NoBatchFitsError(ValueError):
    """Even the smallest batch takes more memory than is available."""


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """The largest batch that fits.

    Attributes:
      batch: the number of examples.
      report: the report of the step; `report.peak_bytes` fits.
      available_bytes: the memory that the step may take.
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
    """Returns the largest batch whose training step fits into the memory of a GPU.

    Compiles steps of different batches for the GPU, which need not be present: about
    five if their memory grows linearly. The step of the returned batch was compiled and
    fits; the step of the next multiple of `multiple_of`, unless it exceeds `upper`, was
    compiled and does not fit. (XLA packs some batches of a large model one percent
    tighter than the next, so a still larger batch may fit, and finding the exact one of
    many hundred takes more compilations: choose a larger `multiple_of`.)

    Args:
      make_step: a function of the batch. Returns a step, its abstract arguments, and
        `donate` of `compile_report`.
      target: the GPU, as for `compile_report`, but not `None`.
      multiple_of: a number that divides the batch.
      fraction: the part of the GPU's memory that may be used. JAX reserves three
        quarters at its start, unless XLA_PYTHON_CLIENT_MEM_FRACTION differs. (XLA
        shrinks a step that takes about as much or more by recomputing values, where
        possible.)
      upper: the largest batch to try.

    Raises:
      NoBatchFitsError: a batch of `multiple_of` does not fit.
      TargetError: the target is unknown or `None`, or has no memory size.
      CompilerError: as for `compile_report`, with a note that names the batch.
      ValueError: `fraction`, `multiple_of` or `upper` is out of range, or
        `compile_report` raises it.
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

    batch = multiple_of * search.largest_within(
        peak_bytes, available, upper // multiple_of
    )
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
