"""Training steps that differ in one number, their times, and lines fitted to these."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np

import dropit_jax
from benchmarks.printing import timing
from benchmarks.workloads import image_models
from benchmarks.workloads.image_models import Workload
from benchmarks.workloads.variants import TIMED_VARIANTS, Variant
from dropit_jax import memory

# The first is the baseline of the others.
VARIANTS = ("flax", "dropit_16", "lean")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Training steps that differ in one number.

    Attributes:
      name: the name of the number.
      title: the model, and the numbers that do not vary.
      axis: the name of the fit's axis, to which the work of plain Flax is proportional.
      values: the values of the number.
      make: a function of a value that returns its workload.
      cost: a function of a value that returns its coordinate on the axis.
    """

    name: str
    title: str
    axis: str
    values: tuple[int, ...]
    make: Callable[[int], Workload]
    cost: Callable[[int], int]


SWEEPS = {
    sweep.name: sweep
    for sweep in (
        Sweep(
            "batch",
            "ResNet-18 of width 16, 32²",
            "batch",
            (8, 16, 32, 64),
            lambda batch: image_models.resnet18(16, batch),
            lambda batch: batch,
        ),
        Sweep(
            "width",
            "ResNet-18, 32², batch 16",
            "width²",
            (8, 16, 32, 64),
            lambda width: image_models.resnet18(width, 16),
            lambda width: width**2,
        ),
        Sweep(
            "depth",
            "MLP of 1024 features, batch 256",
            "hidden layers",
            (2, 4, 8, 16),
            image_models.mlp,
            lambda depth: depth,
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Point:
    """The times of one step.

    Attributes:
      kind: "point".
      sweep: the name of the number that varies.
      value: the value of that number.
      cost: the coordinate of the value on the axis of the fit.
      variant: the variant's name, a way to save memory.
      median_s: seconds of a step, the median over the rounds.
      elements: elements that the variant compresses in a step.
      added_s: seconds that the step takes longer than plain Flax in the same round.
    """

    kind: str
    sweep: str
    value: int
    cost: int
    variant: str
    median_s: float
    elements: int
    added_s: timing.Spread


@dataclasses.dataclass(frozen=True)
class Fit:
    """A line fitted by least squares to the points of a variant in a sweep.

    Attributes:
      kind: "fit".
      sweep: the name of the number that varies.
      variant: the variant's name, a way to save memory.
      of: "step" for the time of a step, "added" for the time that the variant adds.
      against: the name of the axis.
      slope: seconds for each unit of the axis.
      intercept: seconds at 0 on the axis.
      r_squared: the share of the variance that the line explains.
      largest_deviation: the largest distance of a point from the line, as a share of
        the largest value.
    """

    kind: str
    sweep: str
    variant: str
    of: str
    against: str
    slope: float
    intercept: float
    r_squared: float
    largest_deviation: float


def compressed_elements(workload: Workload, variant: Variant) -> int:
    """Returns the elements of all arrays that a variant compresses in a step.

    They are the inputs of DropIT layers, or the values that a preset stores in few
    bits.
    """
    if variant.policy is not None:
        # With a rate of 0 the stored bytes count them: 2 bytes for each element.
        policy = dataclasses.replace(variant.policy, rate=0, value_dtype="bfloat16")
        whole = dataclasses.replace(variant, policy=policy)
        step, arguments, _ = workload.training_step(whole)
        return memory.cached_bytes(step, *arguments) // 2
    if not variant.preset:
        return 0
    _, (variables, _, images, labels), _ = workload.training_step(variant)
    others = {name: each for name, each in variables.items() if name != "params"}
    loss = workload.loss(Variant())
    plan = dropit_jax.plan(lambda *args: loss(*args)[0], variant.preset)
    values = plan(variables["params"], others, images, labels).values
    return sum(
        each.turns * math.prod(each.shape) for each in values if each.form != "exact"
    )


def measure(sweep: Sweep, rounds: int) -> list[Point]:
    """Times all steps of a sweep in turns."""
    runs = {}
    for value in sweep.values:
        workload = sweep.make(value)
        arguments = image_models.real_arguments(workload)
        for name in VARIANTS:
            step, _, _ = workload.training_step(TIMED_VARIANTS[name])
            runs[f"{name}, {value}"] = functools.partial(jax.jit(step), *arguments)
    seconds = timing.interleaved(runs, rounds)
    points = []
    for value in sweep.values:
        plain = seconds[f"{VARIANTS[0]}, {value}"]
        for name in VARIANTS:
            own, variant = seconds[f"{name}, {value}"], TIMED_VARIANTS[name]
            points.append(
                Point(
                    "point",
                    sweep.name,
                    value,
                    sweep.cost(value),
                    name,
                    timing.spread(own).median,
                    compressed_elements(sweep.make(value), variant),
                    timing.spread([a - b for a, b in zip(own, plain, strict=True)]),
                )
            )
    return points


def fits(sweep: Sweep, points: Sequence[Point]) -> list[Fit]:
    """Returns the lines fitted to a sweep's points."""
    found = []
    for name in VARIANTS:
        own = [point for point in points if point.variant == name]
        costs, times = [p.cost for p in own], [p.median_s for p in own]
        found.append(_fit(sweep, name, "step", sweep.axis, costs, times))
    for name in VARIANTS[1:]:
        own = [point for point in points if point.variant == name]
        elements, added = [p.elements for p in own], [p.added_s.median for p in own]
        found.append(_fit(sweep, name, "added", "elements", elements, added))
    return found


def _fit(
    sweep: Sweep,
    variant: str,
    of: str,
    against: str,
    x: Sequence[float],
    y: Sequence[float],
) -> Fit:
    values = np.asarray(y)
    slope, intercept = np.polyfit(x, values, 1)
    off = values - (slope * np.asarray(x) + intercept)
    variance = float(np.sum((values - values.mean()) ** 2))
    largest = float(np.abs(values).max())
    return Fit(
        "fit",
        sweep.name,
        variant,
        of,
        against,
        float(slope),
        float(intercept),
        r_squared=1 - float(np.sum(off**2)) / variance if variance else 1.0,
        largest_deviation=float(np.abs(off).max() / largest) if largest else 0.0,
    )
