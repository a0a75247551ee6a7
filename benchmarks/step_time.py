"""Prints time and memory of a training step, for every way to save memory.

`python -m benchmarks.step_time [--model=MLP] [--variants=dropit_16,lean] [--json]`

Runs on the devices that JAX finds. By default it measures small models on a CPU, and
the models of `benchmarks.memory` on a GPU. All variants of a model take turns in one
run, always with plain Flax (`flax`), the baseline of the ratios. `printing.timing`
defines a ratio and its spread; the definition is printed below the tables.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import jax

from benchmarks.printing import command, timing
from benchmarks.workloads import image_models
from benchmarks.workloads.image_models import Workload
from benchmarks.workloads.variants import TIMED_VARIANTS
from dropit_jax.memory import memory_stats

_BASELINE = "flax"

# Models and their numbers of rounds; all take 15 minutes on two cores.
CPU_MODELS: dict[str, tuple[Workload, int]] = {
    "MLP": (image_models.mlp(), 25),
    "ResNet-18 (width 16)": (image_models.resnet18(16), 15),
    "ResNet-18 (width 64)": (image_models.resnet18(64), 7),
    "ViT-S/16": (image_models.vit_s16(), 9),
}
GPU_MODELS: dict[str, tuple[Workload, int]] = {
    each.name: (each, 9) for each in image_models.WORKLOADS
}
MODELS = CPU_MODELS | GPU_MODELS


@dataclasses.dataclass(frozen=True)
class Result:
    """Time and memory of one variant of a training step.

    Attributes:
      model: the name of the model.
      image_size: the side of the images, in pixels.
      batch: the number of images in the step.
      variant: the name of the variant.
      device: the kind of the device.
      dtype: the dtype of the computation; parameters are float32.
      rounds: the number of rounds; each variant has a turn in a round.
      calls: the number of steps in a turn.
      median_s: the seconds of a step, the median over the rounds.
      ratio: the ratio of a step's time to that of plain Flax in the same round, the
        median over the rounds.
      ratio_low: the lower quartile of the ratio.
      ratio_high: the upper quartile of the ratio.
      trace_s: the seconds to trace and lower the step, the median over the rounds of
        compilation.
      compile_s: the seconds in which XLA compiles the step, likewise.
      compile_ratio: the ratio of the sum of both to that of plain Flax, likewise.
      temp_bytes: the temporary bytes of the compiled step: at the peak, without
        arguments and results.
    """

    model: str
    image_size: int
    batch: int
    variant: str
    device: str
    dtype: str
    rounds: int
    calls: int
    median_s: float
    ratio: float
    ratio_low: float
    ratio_high: float
    trace_s: float
    compile_s: float
    compile_ratio: float
    temp_bytes: int


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A compiled step, and the times of its compilations.

    Attributes:
      run: the compiled step.
      trace_s: the seconds to trace and lower the step, for each round.
      compile_s: the seconds to compile the step, for each round.
    """

    run: jax.stages.Compiled
    trace_s: tuple[float, ...]
    compile_s: tuple[float, ...]

    @property
    def total_s(self) -> list[float]:
        """The sums of both times, for each round."""
        return [a + b for a, b in zip(self.trace_s, self.compile_s, strict=True)]


def measure(
    workload: Workload,
    names: Sequence[str],
    rounds: int,
    compile_rounds: int = 1,
    calls: int = 1,
) -> list[Result]:
    """Returns the results of variants of a workload, in order.

    Args:
      workload: the workload.
      names: the names of the variants, plain Flax first.
      rounds: the number of rounds; each step has a turn in a round.
      compile_rounds: the number of times that each step is compiled.
      calls: the number of steps in a turn.
    """
    arguments = image_models.real_arguments(workload)
    steps = compile_steps(workload, names, compile_rounds)
    runs = {
        name: functools.partial(each.run, *arguments) for name, each in steps.items()
    }
    times = timing.summarise(timing.interleaved(runs, rounds, calls=calls), names[0])
    baseline = steps[names[0]].total_s
    return [
        Result(
            workload.model,
            workload.image_size,
            workload.batch,
            name,
            jax.devices()[0].device_kind,
            workload.dtype,
            rounds,
            calls,
            times[name].median_s,
            times[name].ratio.median,
            times[name].ratio.low,
            times[name].ratio.high,
            timing.spread(step.trace_s).median,
            timing.spread(step.compile_s).median,
            timing.ratio(step.total_s, baseline).median,
            memory_stats(step.run)["temp_bytes"],
        )
        for name, step in steps.items()
    ]


def compile_steps(
    workload: Workload, names: Sequence[str], rounds: int
) -> dict[str, CompiledStep]:
    """Returns the compiled steps of variants; compiles in turns, without caches."""
    _compile(workload, names[0], discard=True)  # imports the modules for tracing
    found: dict[str, list[tuple[Any, float, float]]] = {name: [] for name in names}
    for order in timing.orders(names, rounds):
        for name in order:
            found[name].append(_compile(workload, name))
    return {
        name: CompiledStep(
            times[0][0],
            tuple(trace_s for _, trace_s, _ in times),
            tuple(compile_s for _, _, compile_s in times),
        )
        for name, times in found.items()
    }


def _compile(
    workload: Workload, name: str, discard: bool = False
) -> tuple[Any, float, float]:
    """Returns the compiled step, and the seconds to trace and lower it, and to compile.

    With `discard` it is not compiled: the step is `None`.
    """
    step, arguments, _ = workload.training_step(TIMED_VARIANTS[name])
    jax.clear_caches()  # drops the traces of other variants
    start = perf_counter()
    lowered = jax.jit(step).lower(*arguments)
    traced = perf_counter()
    compiled = None if discard else lowered.compile()
    return compiled, traced - start, perf_counter() - traced


def markdown(results: Sequence[Result]) -> str:
    """Returns the results of a model as a table in Markdown."""
    first = results[0]
    header = ["variant", "step ms", "ratio", "temporaries MiB"]
    header += ["trace s", "compile s", "compile ratio"]
    rows = [
        [
            result.variant,
            f"{1000 * result.median_s:,.1f}",
            str(timing.Spread(result.ratio, result.ratio_low, result.ratio_high)),
            f"{result.temp_bytes / 2**20:,.1f}",
            f"{result.trace_s:.1f}",
            f"{result.compile_s:.1f}",
            f"{result.compile_ratio:.2f}",
        ]
        for result in results
    ]
    where = f"{command.machine(first.device)}, {first.rounds} rounds"
    title = image_models.title(first, where)
    return command.table(title, header, rows)


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("step_time", __doc__)
    command.add_models(parser, MODELS, "the first four on a CPU, the others on a GPU")
    parser.add_argument(
        "--variants",
        default="",
        help=f"some of {','.join(TIMED_VARIANTS)}; default: all",
    )
    parser.add_argument(
        "--rounds", type=timing.count, help="default: of each model its own"
    )
    parser.add_argument(
        "--calls",
        type=timing.count,
        default=1,
        help="steps in a turn, which a GPU computes without a pause (default: 1)",
    )
    parser.add_argument(
        "--compile_rounds",
        type=timing.count,
        default=1,
        help="how often each step is compiled (default: 1)",
    )
    return parser


def _default_models() -> list[str]:
    return list(GPU_MODELS if jax.default_backend() == "gpu" else CPU_MODELS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures the chosen models and variants, and prints the results."""
    parser = _parser()
    flags = parser.parse_args(arguments)
    try:
        models = command.chosen("model", flags.model or _default_models(), MODELS)
        asked = flags.variants.split(",") if flags.variants else []
        names = command.chosen("variant", asked, TIMED_VARIANTS)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    names = [_BASELINE, *(name for name in names if name != _BASELINE)]
    # A program from the cache would not be compiled.
    jax.config.update("jax_enable_compilation_cache", False)
    every: list[Result] = []
    for model in models:
        workload, rounds = MODELS[model]
        rounds = flags.rounds or rounds
        print(f"{model}: {len(names)} variants, {rounds} rounds", file=sys.stderr)
        results = measure(workload, names, rounds, flags.compile_rounds, flags.calls)
        every += results
        if not flags.json:
            print(markdown(results), end="\n\n", flush=True)
    if flags.json:
        print(command.to_json(every))
    else:
        print(f"{timing.DEFINITION} The baseline is {_BASELINE}.")


if __name__ == "__main__":
    main()
