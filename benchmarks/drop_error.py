"""The relative error of gradients under `drop`, and the bytes of their residuals.

`python -m benchmarks.drop_error [--model=NAME] [--json]`

The gradient is that of a training step's loss with respect to all parameters together.
Its error is the norm of its difference from the gradient of `jax.grad`, divided by the
norm of the latter. Random numbers are added to all parameters, so that none has a
special initial value, such as a scale of 1 or a kernel of 0.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.printing import command
from benchmarks.workloads import image_models
from benchmarks.workloads.image_models import Workload
from benchmarks.workloads.variants import VARIANTS
from dropit_jax import drop, plan

MODELS: dict[str, Workload] = {
    "ViT-S/16": image_models.vit_s16(batch=4),
    "ResNet-18 (width 16)": image_models.resnet18(16, batch=16),
}
PRESETS = ("exact", "lean", "leanest")
# The standard deviation of the random numbers added to the parameters.
_PERTURBATION = 0.02


@dataclasses.dataclass(frozen=True)
class Result:
    """The bytes that a preset stores, and the error of its gradient.

    Attributes:
      model: the model's name.
      image_size: side of the images, in pixels.
      batch: images in the step.
      dtype: the type of the computation.
      preset: the preset of `dropit_jax.drop`.
      error: the relative error of the whole gradient.
      stored_bytes: bytes that the function stores, by its plan.
      plain_bytes: bytes that the plain function stores, by the same plan.
    """

    model: str
    image_size: int
    batch: int
    dtype: str
    preset: str
    error: float
    stored_bytes: int
    plain_bytes: int


def measure(workload: Workload, presets: Sequence[str] = PRESETS) -> list[Result]:
    """Returns the error and the stored bytes of a workload under each preset."""
    loss = workload.loss(VARIANTS["baseline"])
    arguments = _arguments(workload)
    exact = _gradient(loss, arguments)
    results = []
    for preset in presets:
        planned = plan(loss, preset)(*arguments)
        found = _gradient(drop(loss, preset), arguments)
        results.append(
            Result(
                workload.model,
                workload.image_size,
                workload.batch,
                workload.dtype,
                preset,
                relative_error(found, exact),
                planned.nbytes,
                planned.plain_bytes,
            )
        )
    return results


def relative_error(found: Any, expected: Any) -> float:
    """Returns |found - expected| / |expected| of two trees of arrays."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    difference = norm = 0.0  # squared
    for a, b in pairs:
        wide = np.asarray(b, np.float64)
        difference += float(np.sum((np.asarray(a, np.float64) - wide) ** 2))
        norm += float(np.sum(wide**2))
    return (difference / norm) ** 0.5


def _gradient(loss: Any, arguments: tuple[Any, ...]) -> Any:
    gradient, _ = jax.jit(jax.grad(loss, has_aux=True))(*arguments)
    return gradient


def _arguments(workload: Workload) -> tuple[Any, ...]:
    """Returns arguments of the loss, with random numbers added to the parameters."""
    variables, _, images, labels = image_models.real_arguments(workload)
    others = {name: each for name, each in variables.items() if name != "params"}
    leaves, structure = jax.tree.flatten(variables["params"])
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = jax.tree.unflatten(
        structure,
        [
            leaf + _PERTURBATION * jax.random.normal(key, leaf.shape, jnp.float32)
            for key, leaf in zip(keys, leaves, strict=True)
        ],
    )
    return params, others, images, labels


def markdown(results: Sequence[Result]) -> str:
    """Returns the results of one model as a Markdown table."""
    first, mib = results[0], 2**-20
    header = ["preset", "error", "stored MiB", "plain MiB", "ratio"]
    rows = [
        [
            result.preset,
            f"{result.error:.2g}",
            f"{result.stored_bytes * mib:,.1f}",
            f"{result.plain_bytes * mib:,.1f}",
            f"{result.stored_bytes / result.plain_bytes:.3f}",
        ]
        for result in results
    ]
    device = command.machine(jax.devices()[0].device_kind)
    return command.table(image_models.title(first, device), header, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and prints its results."""
    parser = command.parser("drop_error", __doc__)
    command.add_models(parser, MODELS)
    flags = parser.parse_args(arguments)
    try:
        models = command.chosen("model", flags.model, MODELS)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    every: list[Result] = []
    for model in models:
        results = measure(MODELS[model])
        every += results
        if not flags.json:
            print(markdown(results), end="\n\n", flush=True)
    if flags.json:
        print(command.to_json(every))


if __name__ == "__main__":
    main()
