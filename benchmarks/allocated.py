"""Memory of a training step on the GPU at hand, measured and predicted.

`python -m benchmarks.allocated [--model=NAME] [--variants=lean] [--batch=512] [--json]`

`dropit_jax.memory.compile_report` predicts the memory of a step from a description of
the GPU; here the step runs, and the allocator reports the peak of its process. XLA
allocates memory too when it compiles, to try out GPU kernels, so each step is compiled
in one process and runs in another. Needs an NVIDIA GPU.
"""

import dataclasses
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import Any

import jax

from benchmarks.printing import command, timing
from benchmarks.step_time import GPU_MODELS
from benchmarks.workloads import image_models
from benchmarks.workloads.variants import VARIANTS
from dropit_jax import memory


@dataclasses.dataclass(frozen=True)
class Result:
    """Memory of one variant of a training step, measured and predicted.

    Attributes:
      model: the model's name.
      image_size: side of the images, in pixels.
      batch: images in the step.
      dtype: the type of the computation.
      variant: the variant's name, a way to save memory.
      device: the kind of device that the step ran on.
      target: the name of the GPU's description that the prediction is for.
      predicted_bytes: `CompileReport.peak_bytes`: arguments, results, and temporaries.
      compiled_bytes: the same for the program that ran, whose GPU kernels XLA chose by
        trying them out; `None` if there was not enough memory.
      allocated_bytes: the allocator's peak over two steps; `None` likewise.
      ratio: allocated over predicted bytes; `None` likewise.
    """

    model: str
    image_size: int
    batch: int
    dtype: str
    variant: str
    device: str
    target: str
    predicted_bytes: int
    compiled_bytes: int | None
    allocated_bytes: int | None
    ratio: float | None


def run(
    model: str, variant: str, batch: int | None, cache: str
) -> tuple[int, int] | None:
    """Runs two steps and returns their memory.

    The process must be new, as the allocator's peak is that of the process.

    Args:
      model: one of `GPU_MODELS`.
      variant: one of `Workload.variants`.
      batch: images in the step; `None` for the model's own.
      cache: a directory of compiled programs.

    Returns:
      The bytes of the compiled program and the allocator's peak in bytes; `None` if the
      step does not fit in memory.
    """
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    workload = GPU_MODELS[model][0]
    workload = dataclasses.replace(workload, batch=batch or workload.batch)
    step, _, donate = workload.training_step(workload.variants[variant])
    try:
        variables, opt_state, *data = image_models.real_arguments(workload)
        lowered = jax.jit(step, donate_argnums=donate).lower(
            variables, opt_state, *data
        )
        compiled = lowered.compile()
        for _ in range(2):
            variables, opt_state = compiled(variables, opt_state, *data)
        jax.block_until_ready(variables)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return None
        raise
    stats = memory.memory_stats(compiled)
    results = stats["output_bytes"] - stats["aliased_bytes"]
    compiled_bytes = stats["argument_bytes"] + results + stats["temp_bytes"]
    allocator: Mapping[str, Any] = jax.devices()[0].memory_stats()
    return compiled_bytes, int(allocator["peak_bytes_in_use"])


def measure(
    model: str,
    names: Sequence[str],
    target: str,
    batch: int | None,
    processes: Executor,
) -> list[Result]:
    """Measures variants of a model's step.

    Args:
      model: one of `GPU_MODELS`.
      names: the names of the variants.
      target: the GPU at hand, as `compile_report` names it.
      batch: images in a step; `None` for the model's own.
      processes: an executor that runs each task in a new process.
    """
    workload = GPU_MODELS[model][0]
    results = []
    with tempfile.TemporaryDirectory() as cache:
        tasks = [(model, name, batch, cache) for name in names]
        for future in [processes.submit(run, *task) for task in tasks]:
            future.result()
        running = [processes.submit(run, *task) for task in tasks]
        for name, future in zip(names, running, strict=True):
            step, args, donate = workload.training_step(workload.variants[name], batch)
            report = memory.compile_report(step, *args, target=target, donate=donate)
            compiled, allocated = future.result() or (None, None)
            results.append(
                Result(
                    workload.model,
                    workload.image_size,
                    batch or workload.batch,
                    workload.dtype,
                    name,
                    jax.devices()[0].device_kind,
                    target,
                    report.peak_bytes,
                    compiled,
                    allocated,
                    None if allocated is None else allocated / report.peak_bytes,
                )
            )
    return results


def markdown(results: Sequence[Result]) -> str:
    """Returns the results of one model as a Markdown table."""
    first = results[0]
    header = ["variant", "predicted MiB", "compiled MiB", "allocated MiB", "ratio"]
    rows = [
        [
            each.variant,
            _mib(each.predicted_bytes),
            _mib(each.compiled_bytes),
            _mib(each.allocated_bytes),
            "-" if each.ratio is None else f"{each.ratio:.3f}",
        ]
        for each in results
    ]
    return command.table(image_models.title(first, first.device), header, rows)


def _mib(nbytes: int | None) -> str:
    return "out of memory" if nbytes is None else f"{nbytes * 2**-20:,.0f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and prints its results."""
    parser = command.parser("allocated", __doc__)
    command.add_models(parser, GPU_MODELS)
    parser.add_argument(
        "--variants",
        default="",
        help=f"some of {','.join(VARIANTS)}; default: all",
    )
    parser.add_argument("--batch", type=int, help="default: of each model its own")
    parser.add_argument(
        "--target", default="h100", help="the GPU at hand (default: %(default)s)"
    )
    parser.add_argument(
        "--processes",
        type=timing.count,
        default=1,
        help="how many steps are in memory at a time (default: %(default)s)",
    )
    flags = parser.parse_args(arguments)
    # Otherwise JAX takes three quarters of the GPU's memory at the start of a process.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    every: list[Result] = []
    try:
        models = command.chosen("model", flags.model, GPU_MODELS)
        asked = flags.variants.split(",") if flags.variants else []
        names = command.chosen("variant", asked, VARIANTS)
        if flags.batch is not None and flags.batch < 1:
            raise ValueError(f"--batch: takes a positive integer, got {flags.batch}")
        if jax.default_backend() != "gpu":
            raise ValueError(
                f"an NVIDIA GPU is needed, and JAX finds {jax.devices()[0]}"
            )
        with ProcessPoolExecutor(
            flags.processes, multiprocessing.get_context("spawn"), max_tasks_per_child=1
        ) as processes:
            for model in models:
                known = GPU_MODELS[model][0].variants
                results = measure(
                    model,
                    [name for name in names if name in known],
                    flags.target,
                    flags.batch,
                    processes,
                )
                every += results
                if not flags.json:
                    print(markdown(results), end="\n\n", flush=True)
    except (ValueError, memory.CompilerError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if flags.json:
        print(command.to_json(every))


if __name__ == "__main__":
    main()
