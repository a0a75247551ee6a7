"""The times of `drop` on a CPU: of steps, compilation and planning.

`python -m benchmarks.drop_time [--model=NAME] [--rounds=9] [--json]`

Steps with `drop` take turns with plain Flax and with recomputed blocks, as in
`benchmarks.step_time`. Planning is timed in processor seconds, on a transformer whose
24 blocks are not in a loop.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from time import process_time
from typing import Any

import jax

from benchmarks import step_time
from benchmarks.printing import command, timing
from benchmarks.workloads import image_models
from benchmarks.workloads.image_models import Workload
from benchmarks.workloads.transformer import UNROLLED, Transformer
from benchmarks.workloads.variants import VARIANTS
from dropit_jax import plan

# The models, and the number of rounds for each.
MODELS: dict[str, tuple[Workload, int]] = {
    "ViT-S/16": (image_models.vit_s16(batch=8), 9),
    "ResNet-18 (width 64)": (image_models.resnet18(64), 9),
}
_NAMES = ("flax", "exact", "lean", "remat_blocks")
_COMPILE_ROUNDS = 3
_PLANNED = ("exact", "lean", "leanest")
_TRACE = "trace"


@dataclasses.dataclass(frozen=True)
class Planning:
    """Times of planning a loss.

    The medians are of processor seconds, which other programs do not lengthen. Planning
    and tracing use one core.

    Attributes:
      model: the name of the model whose loss is planned.
      preset: the preset of the plan.
      trace_s: median seconds in which JAX traces the loss's gradient.
      plan_s: median seconds of `dropit_jax.plan`, which traces the loss, its forward
        and its backward pass, and plans.
    """

    model: str
    preset: str
    trace_s: float
    plan_s: float


def planning(model: Transformer, rounds: int) -> list[Planning]:
    """Times planning with every preset, and tracing of the gradient, in turns."""
    loss, arguments = model.loss(VARIANTS["baseline"]), model.arguments()
    gradient = jax.grad(loss, has_aux=True)
    calls: dict[str, Callable[..., Any]] = {
        preset: plan(loss, preset) for preset in _PLANNED
    }
    calls[_TRACE] = jax.make_jaxpr(gradient)
    runs = {
        name: functools.partial(_fresh, each, arguments) for name, each in calls.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()  # the first call imports modules
    for order in timing.orders(runs, rounds):
        for name in order:
            start = process_time()
            runs[name]()
            seconds[name].append(process_time() - start)
    medians = {name: timing.spread(each).median for name, each in seconds.items()}
    return [
        Planning(model.model, preset, medians[_TRACE], medians[preset])
        for preset in _PLANNED
    ]


def _fresh(call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    jax.clear_caches()  # of functions that earlier calls traced
    return call(*arguments)


def markdown(model: Transformer, results: Sequence[Planning]) -> str:
    """Returns the times of planning as a Markdown table."""
    header = ["preset", "gradient traced s", "planned s"]
    rows = [
        [each.preset, f"{each.trace_s:.2f}", f"{each.plan_s:.2f}"] for each in results
    ]
    where = command.machine(jax.devices()[0].device_kind)
    return command.table(model.title(where), header, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and prints its results."""
    parser = command.parser("drop_time", __doc__)
    known = [*MODELS, UNROLLED.name]
    command.add_models(parser, known)
    parser.add_argument(
        "--rounds", type=timing.count, help="default: of each model its own"
    )
    flags = parser.parse_args(arguments)
    try:
        models = command.chosen("model", flags.model, known)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    # A program from the cache would not be compiled.
    jax.config.update("jax_enable_compilation_cache", False)
    every: list[Any] = []
    for model in models:
        print(model, file=sys.stderr)
        if model in MODELS:
            workload, rounds = MODELS[model]
            rounds = flags.rounds or rounds
            steps = step_time.measure(workload, _NAMES, rounds, _COMPILE_ROUNDS)
            every += steps
            table = step_time.markdown(steps)
        else:
            plans = planning(UNROLLED, flags.rounds or _COMPILE_ROUNDS)
            every += plans
            table = markdown(UNROLLED, plans)
        if not flags.json:
            print(table, end="\n\n", flush=True)
    if flags.json:
        print(command.to_json(every))
    else:
        print(f"{timing.DEFINITION} The baseline is {_NAMES[0]}.")


if __name__ == "__main__":
    main()
