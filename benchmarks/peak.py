"""Prints the largest buffers of a training step at the peak of its memory on a GPU.

`python -m benchmarks.peak [--model=NAME] [--variants='lean'] [--top=8] [--json]`

The buffers explain a figure of `benchmarks.memory`. A row has all buffers of one type
that one operation makes, in all layers.
"""

import argparse
import collections
import dataclasses
from collections.abc import Iterable, Sequence

from benchmarks.memory import MODELS, Workload
from benchmarks.printing import command
from benchmarks.workloads.variants import VARIANTS
from dropit_jax import memory


@dataclasses.dataclass(frozen=True)
class Held:
    """Buffers of one type that one operation makes.

    Attributes:
      model: the name of the model.
      variant: the name of the variant.
      target: the name of the GPU.
      buffers: the number of buffers.
      type: the type of the array in a buffer, such as "float32[128,8,8,256]".
      operation: JAX's name of the operation.
      backward: whether the operation is in the backward pass.
      nbytes: the bytes of all these buffers.
      share: the fraction of `nbytes` in the temporary bytes of the step.
    """

    model: str
    variant: str
    target: str
    buffers: int
    type: str
    operation: str
    backward: bool
    nbytes: int
    share: float


def measure(workload: Workload, variant: str, target: str, top: int) -> list[Held]:
    """Returns the buffers at the peak of a variant's step, the largest rows first.

    Args:
      workload: the workload.
      variant: the name of the variant.
      target: the GPU to compile for.
      top: the number of rows.
    """
    step, args, donate = workload.training_step(workload.variants[variant])
    report = memory.compile_report(
        step, *args, target=target, donate=donate, num_buffers=_ALL
    )
    groups: dict[tuple[str, str, bool], list[int]] = collections.defaultdict(list)
    for each in report.buffers:
        shape = ",".join(map(str, each.shape))
        key = f"{each.dtype}[{shape}]", each.operation, each.backward
        groups[key].append(each.nbytes)
    rows = [
        Held(
            workload.name,
            variant,
            target,
            len(sizes),
            *key,
            sum(sizes),
            sum(sizes) / report.temp_bytes,
        )
        for key, sizes in groups.items()
    ]
    return sorted(rows, key=lambda row: row.nbytes, reverse=True)[:top]


_ALL = 1_000_000


def markdown(workload: Workload, results: Iterable[Held]) -> str:
    """Returns the buffers of one variant as a table in Markdown."""
    results = list(results)
    first = results[0]
    header = ["buffers", "array", "made by", "pass", "MiB", "share"]
    rows = [
        [
            str(each.buffers),
            each.type,
            each.operation,
            "backward" if each.backward else "forward",
            f"{each.nbytes * 2**-20:,.1f}",
            f"{each.share:.3f}",
        ]
        for each in results
    ]
    title = f"{workload.title(first.target)}, {first.variant}"
    return command.table(title, header, rows)


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("peak", __doc__)
    parser.add_argument("--target", default="h100", help="the GPU to compile for")
    command.add_models(parser, MODELS)
    parser.add_argument(
        "--variants",
        default="lean",
        help=f"some of {','.join(VARIANTS)}; default: lean",
    )
    parser.add_argument("--top", type=int, default=8, help="rows of each table")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures the chosen models and variants, and prints the tables."""
    parser = _parser()
    flags = parser.parse_args(arguments)
    try:
        models = command.chosen("model", flags.model, MODELS)
        names = command.chosen("variant", flags.variants.split(","), VARIANTS)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    every: list[Held] = []
    for model in models:
        workload = MODELS[model]
        for name in (each for each in workload.variants if each in names):
            try:
                results = measure(workload, name, flags.target, flags.top)
            except (memory.CompilerError, memory.TargetError) as error:
                parser.exit(2, f"error: {error}\n")
            every += results
            if not flags.json:
                print(markdown(workload, results), end="\n\n", flush=True)
    if flags.json:
        print(command.to_json(every))


if __name__ == "__main__":
    main()
