"""Prints the memory of a training step on a GPU, for every preset and alternative.

`python -m benchmarks.memory [--target=h100] [--model=NAME] [--json] [--max_batch]`

The GPU need not be there: XLA's compiler for the GPU reports the memory. All rows of a
table are compiled in one run, with the same flags.
"""

import argparse
import dataclasses
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from benchmarks.printing import command
from benchmarks.workloads import image_models, transformer
from benchmarks.workloads.transformer import Transformer
from benchmarks.workloads.variants import VARIANTS
from dropit_jax import memory

Workload = image_models.Workload | Transformer

MODELS: dict[str, Workload] = {
    each.name: each for each in (*image_models.WORKLOADS, transformer.SCANNED)
}

# The paper's GPU, and a newer one.
_MAX_BATCH_TARGETS = ("a5000", "h100")
_MAX_BATCH_VARIANTS = (
    "baseline",
    "lean",
    "lean+remat_blocks",
    "dropit_layers",
    "remat_blocks",
)
# The largest batch is a multiple of this number.
_MULTIPLE = 8
# The number of concurrent compilations.
_WORKERS = 2


@dataclasses.dataclass(frozen=True)
class Result:
    """Memory, operations and traffic of one variant of a training step.

    Attributes:
      model: the name of the model.
      image_size: the side of the images, in pixels; `None`: there are no images.
      batch: the number of images or sequences in the step.
      dtype: the dtype of the computation.
      variant: the name of the variant.
      target: the name of the GPU.
      temp_bytes: the bytes that the step allocates beside arguments and results.
      ratio: the ratio of `temp_bytes` to the baseline's.
      flops: the FLOPs of the compiled step.
      flops_ratio: the ratio of `flops` to the baseline's.
      flops_ratio_with_attention: the ratio of `flops` to the FLOPs of the baseline and
        of computing the attention's scores once more.
      max_batch: the largest batch that fits, a multiple of 8, for each GPU; `None`: not
        measured.
      traffic_bytes: the bytes that the kernels of the compiled step read and write;
        `None`: an old result, without this field.
      traffic_ratio: the ratio of `traffic_bytes` to the baseline's; `None` likewise.
    """

    model: str
    image_size: int | None
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
    traffic_bytes: int | None = None
    traffic_ratio: float | None = None


def measure(workload: Workload, target: str, names: Sequence[str]) -> list[Result]:
    """Returns the results of variants of a workload, in order.

    Args:
      workload: the workload.
      target: the GPU to compile for.
      names: the names of the variants; the first is the baseline.
    """

    def report(name: str) -> memory.CompileReport:
        step, args, donate = workload.training_step(workload.variants[name])
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
            traffic_bytes=report.traffic_bytes,
            traffic_ratio=report.traffic_bytes / baseline.traffic_bytes,
        )
        for name, report in reports.items()
    ]


def largest_batch(workload: Workload, variant: str, target: str) -> int:
    """Returns the largest batch whose step fits into a GPU's memory."""
    make_step = functools.partial(workload.training_step, workload.variants[variant])
    return memory.max_batch(make_step, target, multiple_of=_MULTIPLE).batch


def with_largest_batch(workload: Workload, result: Result) -> Result:
    """Returns a result with `max_batch`, if its variant is in `_MAX_BATCH_VARIANTS`."""
    if result.variant not in _MAX_BATCH_VARIANTS:
        return result
    batches = {
        target: largest_batch(workload, result.variant, target)
        for target in _MAX_BATCH_TARGETS
    }
    return dataclasses.replace(result, max_batch=batches)


def _measured(
    workload: Workload, names: Sequence[str], target: str, max_batch: bool
) -> list[Result]:
    """Returns the results of variants of a workload, the baseline first."""
    own = list(workload.variants)
    of_model = [own[0], *(name for name in own[1:] if name in names)]
    results = measure(workload, target, of_model)
    if not max_batch:
        return results
    find = functools.partial(with_largest_batch, workload)
    with ThreadPoolExecutor(_WORKERS) as pool:
        return list(pool.map(find, results))


def markdown(workload: Workload, results: list[Result]) -> str:
    """Returns the results of a workload as a table in Markdown."""
    first, mib = results[0], 2**-20
    header = ["variant", "temp MiB", "ratio", "FLOPs ratio", "with attention"]
    header += [] if first.traffic_bytes is None else ["traffic GB", "traffic ratio"]
    batches = list(first.max_batch or ())
    header += [f"largest batch, {gpu}" for gpu in batches]
    rows = [
        [
            result.variant,
            f"{result.temp_bytes * mib:,.0f}",
            f"{result.ratio:.3f}",
            f"{result.flops_ratio:.3f}",
            f"{result.flops_ratio_with_attention:.3f}",
            *_traffic(result),
            *(_batch(result, gpu) for gpu in batches),
        ]
        for result in results
    ]
    text = command.table(workload.title(first.target), header, rows)
    if workload.paper_mb is None:
        return text
    plain, dropped = workload.paper_mb
    return (
        f"{text}\n\nThe paper (Table 3; PyTorch, all of a GPU's memory): {plain:,} MB, "
        f"with DropIT {dropped:,} MB, ratio {dropped / plain:.3f}."
    )


def _traffic(result: Result) -> list[str]:
    if result.traffic_bytes is None:
        return []
    return [f"{result.traffic_bytes * 1e-9:,.1f}", f"{result.traffic_ratio:.3f}"]


def _batch(result: Result, target: str) -> str:
    return "-" if result.max_batch is None else f"{result.max_batch[target]:,}"


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("memory", __doc__)
    parser.add_argument("--target", default="h100", help="the GPU to compile for")
    command.add_models(parser, MODELS)
    parser.add_argument(
        "--variants",
        default="",
        help=f"some of {','.join(VARIANTS)}, beside the first; default: all that a "
        "model has",
    )
    parser.add_argument(
        "--max_batch",
        action="store_true",
        help="also find the largest batches, which takes hundreds of compilations",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures the chosen models and variants, and prints the results."""
    parser = _parser()
    flags = parser.parse_args(arguments)
    try:
        models = command.chosen("model", flags.model, MODELS)
        asked = flags.variants.split(",") if flags.variants else []
        names = command.chosen("variant", asked, VARIANTS)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    every: list[Result] = []
    for model in models:
        try:
            results = _measured(MODELS[model], names, flags.target, flags.max_batch)
        except (
            memory.CompilerError,
            memory.NoBatchFitsError,
            memory.TargetError,
        ) as error:
            parser.exit(2, f"error: {error}\n")
        every += results
        if not flags.json:
            print(markdown(MODELS[model], results), end="\n\n", flush=True)
    if flags.json:
        print(command.to_json(every))


if __name__ == "__main__":
    main()
