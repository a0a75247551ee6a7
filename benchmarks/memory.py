"""What a training step allocates on a GPU, for every preset and its peers.

`python -m benchmarks.memory [--target=h100] [--json] [--max_batch]`

The GPU need not be there: XLA's own compiler for it is asked. Every row of the table is
compiled in this run, with the same flags.
"""

import dataclasses
import functools
import sys
from concurrent.futures import ThreadPoolExecutor

from benchmarks import command, workloads
from benchmarks.workloads import Workload
from dropit_jax import memory

# The paper's GPU, and one of today.
_MAX_BATCH_TARGETS = ("a5000", "h100")
_MAX_BATCH_VARIANTS = (
    "baseline",
    "dropit",
    "lean",
    "lean+remat_blocks",
    "remat_blocks",
)
# Batches are multiples of this.
_MULTIPLE = 8
# Compilations at a time.
_WORKERS = 2


@dataclasses.dataclass(frozen=True)
class Result:
    """What one variant of a training step takes.

    Attributes:
      model: its name.
      image_size: side of the images, in pixels.
      batch: images in the step.
      dtype: of the computation.
      variant: which way of saving memory.
      target: the GPU.
      temp_bytes: what the step allocates beside arguments and results.
      ratio: of these to the baseline's.
      flops: of the compiled step.
      flops_ratio: of these to the baseline's.
      flops_ratio_with_attention: of these to the baseline's and those of computing the
        attention's scores once more.
      max_batch: by GPU, the largest batch that fits, in multiples of 8; `None`: not
        asked for, or not of this variant.
    """

    model: str
    image_size: int
    batch: int
    dtype: str
    variant: str
    target: str
    temp_bytes: int
    ratio: float
    flops: float
    flops_ratio: float
    flops_ratio_with_attention: float
    max_batch: dict[str, int] | None = None


def measure(workload: Workload, target: str, names: tuple[str, ...]) -> list[Result]:
    """Compiles variants of a workload's step; the first is the baseline."""
    presets = workloads.variants(workload)

    def report(name: str) -> memory.CompileReport:
        step, args, donate = workloads.training_step(workload, presets[name])
        return memory.compile_report(step, *args, target=target, donate=donate)

    with ThreadPoolExecutor(_WORKERS) as pool:
        reports = dict(zip(names, pool.map(report, names), strict=True))
    baseline = reports[names[0]]
    with_attention = baseline.flops + workload.attention_core_flops
    return [
        Result(
            workload.model,
            workload.image_size,
            workload.batch,
            workload.dtype,
            name,
            target,
            report.temp_bytes,
            report.temp_bytes / baseline.temp_bytes,
            report.flops,
            report.flops / baseline.flops,
            report.flops / with_attention,
        )
        for name, report in reports.items()
    ]


def largest_batch(workload: Workload, variant: str, target: str) -> int:
    """The largest batch whose step fits into a GPU's memory."""
    preset = workloads.variants(workload)[variant]
    make_step = functools.partial(workloads.training_step, workload, preset)
    return memory.max_batch(make_step, target, multiple_of=_MULTIPLE).batch


def with_largest_batch(workload: Workload, result: Result) -> Result:
    """A result, and the largest batches beside it."""
    if result.variant not in _MAX_BATCH_VARIANTS:
        return result
    batches = {
        target: largest_batch(workload, result.variant, target)
        for target in _MAX_BATCH_TARGETS
    }
    return dataclasses.replace(result, max_batch=batches)


def markdown(workload: Workload, results: list[Result]) -> str:
    """The results of a workload as a table."""
    target, mib = results[0].target, 2**-20
    header = ["variant", "temp MiB", "ratio", "FLOPs ratio", "with attention"]
    batches = list(results[0].max_batch or ())
    header += [f"largest batch, {gpu}" for gpu in batches]
    rows = [
        [
            result.variant,
            f"{result.temp_bytes * mib:,.0f}",
            f"{result.ratio:.3f}",
            f"{result.flops_ratio:.3f}",
            f"{result.flops_ratio_with_attention:.3f}",
            *(_batch(result, gpu) for gpu in batches),
        ]
        for result in results
    ]
    text = command.table(workloads.title(workload, target), header, rows)
    if workload.paper_mb is None:
        return text
    plain, dropped = workload.paper_mb
    return (
        f"{text}\n\nThe paper (Table 3; PyTorch, all of a GPU's memory): {plain:,} MB, "
        f"with DropIT {dropped:,} MB, ratio {dropped / plain:.3f}."
    )


def _batch(result: Result, target: str) -> str:
    return "-" if result.max_batch is None else f"{result.max_batch[target]:,}"


def main() -> None:
    """Prints what was asked for."""
    parser = command.parser("memory", __doc__)
    parser.add_argument("--target", default="h100", help="the GPU to compile for")
    parser.add_argument(
        "--max_batch",
        action="store_true",
        help="also find the largest batches, which takes hundreds of compilations",
    )
    flags = parser.parse_args()
    every: list[Result] = []
    for workload in workloads.WORKLOADS:
        try:
            names = tuple(workloads.variants(workload))
            results = measure(workload, flags.target, names)
            if flags.max_batch:
                find = functools.partial(with_largest_batch, workload)
                with ThreadPoolExecutor(_WORKERS) as pool:
                    results = list(pool.map(find, results))
        except (
            memory.CompilerError,
            memory.NoBatchFitsError,
            memory.TargetError,
        ) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        every += results
        if not flags.json:
            print(markdown(workload, results), flush=True)
            print(flush=True)
    if flags.json:
        print(command.to_json(every))


if __name__ == "__main__":
    main()
