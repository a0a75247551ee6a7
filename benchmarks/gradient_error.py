"""The errors of DropIT's weight gradients, for every policy.

`python -m benchmarks.gradient_error --config=configs/FILE.py --workdir=DIR
[--output=DIR] [--layers=5]`

The command trains a model of plain Flax by the config in the workdir, or continues or
loads the training that it finds there. One batch then gives the input activation a and
the cotangent of some layers, spread from the first that stores its input to the last.
(Left out are layers that a policy cannot compress, and those that do not read all
positions, such as a shortcut of stride 2.) Each policy compresses the activation, and
the weight gradient g of the rebuilt activation â is compared with that of a:

    error  = |g(â) - g(a)| / |g(a)|       cosine = g(â) · g(a) / (|g(â)| |g(a)|)

The directory OUTPUT, by default the workdir, then has `gradient_error.csv`, with a row
for each policy and layer, and `gradient_error.md` with the figures: the bits an element
of each policy, and the policies on the front, where less error costs more bits.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict

from benchmarks.printing import command, gradient_error_plots
from benchmarks.workloads.layer_captures import Layer, capture
from dropit_jax import DropIT, compress
from train import cli, loop
from train.config import config as config_lib
from train.config import flags as config_flags
from train.config.config import ConfigError
from train.config.flags import output_path
from train.reports.histograms import reads_all
from train.runs import trained
from train.system import tables
from train.system.files import write_atomically
from train.system.terminal import Terminal

config_flags.output()

_LAYERS = flags.DEFINE_integer(
    "layers", 5, "How many layers, from the first to the last.", lower_bound=1
)

CHUNK_SIZES = (8, 16, 32, 64, 256, 2048, 2**14, None)
RATES = (0.5, 0.75, 0.875, 0.95, 0.99)
_TYPES = ("bfloat16", "float16", "int8", "int4", "int2")
_TIMED = 5  # calls
# The bits an element up to which the best policies are named.
_BUDGETS = (0.5, 1, 1.5, 2, 2.5, 3.5, 4.5, 8.5, 16.5, 33)


@dataclasses.dataclass(frozen=True)
class Error:
    """The error of a layer's weight gradient under a policy.

    Attributes:
      family: the policy's family, as the figures name it.
      policy: the policy's name.
      layer: the layer's name.
      elements: the elements of the activation.
      bits: stored bits for each element of the activation.
      error: the norm of the difference from the exact gradient, divided by its norm.
      cosine: the cosine of the angle between the two gradients.
      compress_ns: nanoseconds to compress an element, on this machine.
    """

    family: str
    policy: str
    layer: str
    elements: int
    bits: float
    error: float
    cosine: float
    compress_ns: float


def grid() -> dict[str, tuple[str, DropIT]]:
    """Returns every measured policy and its family, by the policy's name."""
    found: dict[str, tuple[str, DropIT]] = {}

    def add(family: str, **fields: object) -> None:
        policy = DropIT(**fields)  # type: ignore[arg-type]
        found[_name(policy)] = family, policy

    for rate in RATES:
        for chunk_size in CHUNK_SIZES:
            family = "min-k, D = 16" if chunk_size == 16 else "min-k, other D"
            add(family, rate=rate, chunk_size=chunk_size)
            add("random elements", rate=rate, chunk_size=chunk_size, strategy="random")
        add("channels", rate=rate, granularity="channel")
        add("random channels", rate=rate, granularity="channel", strategy="random")
        add("mean for the dropped", rate=rate, fill="mean")
        for value_dtype in _TYPES:
            add("values of fewer bits", rate=rate, value_dtype=value_dtype)
            add("mean for the dropped", rate=rate, value_dtype=value_dtype, fill="mean")
    for value_dtype in _TYPES:
        add("nothing dropped", rate=0.0, value_dtype=value_dtype)
    return found


def _name(policy: DropIT) -> str:
    words = [f"{policy.rate:.1%}"]
    if policy.strategy != "min_k":
        words.append(policy.strategy)
    if policy.granularity == "channel":
        words.append("channels")
    elif policy.rate:
        words.append(f"D={policy.chunk_size or 'all'}")
    if policy.value_dtype:
        words.append(policy.value_dtype)
    if policy.fill == "mean":
        words.append("mean")
    return " ".join(words)


def main(config: ConfigDict, workdir: Path) -> None:
    """Trains, measures, and writes the results."""
    run(config, workdir, output_path(workdir), grid(), _LAYERS.value, Terminal())


def run(
    config: ConfigDict,
    workdir: Path,
    output: Path,
    policies: Mapping[str, tuple[str, DropIT]],
    layers: int,
    terminal: Terminal,
) -> None:
    """Does what `main` does, for these policies.

    Raises:
      ConfigError: the config cannot be run, or the model has too few layers.
    """
    config = config_lib.plain(config)
    loop.run(config, workdir, terminal)
    captured = _captured(config, workdir, terminal)
    suited = [layer for layer in captured if _suits(layer, policies, terminal)]
    chosen = _spread(suited, layers)
    errors: list[Error] = []
    for number, layer in enumerate(chosen, 1):
        terminal.say(f"Layer {number} of {layers}: {layer.name} {layer.x.shape}")
        errors += measure(layer, policies)
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "gradient_error.csv", to_csv(errors))
    means = averaged(errors)
    gradient_error_plots.front(means, front(means), output / "gradient_error.png")
    gradient_error_plots.chunks(means, output / "gradient_error_chunks.png")
    page = to_markdown(means, chosen, config)
    write_atomically(output / "gradient_error.md", page)
    terminal.say(f"Results: {output / 'gradient_error.md'}")


def measure(layer: Layer, policies: Mapping[str, tuple[str, DropIT]]) -> list[Error]:
    """Returns the errors of a layer's weight gradient, one for each policy."""
    gradient = jax.jit(layer.kernel_gradient)
    exact = gradient(layer.x)
    errors = []
    for name, (family, policy) in policies.items():
        key = jax.random.key(0) if policy.needs_key else None
        keep = jax.jit(lambda x, key, policy=policy: compress(x, policy, key))
        residual = jax.block_until_ready(keep(layer.x, key))
        seconds = []
        for _ in range(_TIMED):
            start = time.perf_counter()
            jax.block_until_ready(keep(layer.x, key))
            seconds.append(time.perf_counter() - start)
        rebuilt = jax.jit(lambda residual: residual.decompress())(residual)
        error, cosine = _error_and_cosine(gradient(rebuilt), exact)
        errors.append(
            Error(
                family,
                name,
                layer.name,
                layer.x.size,
                8 * residual.nbytes / layer.x.size,
                error,
                cosine,
                1e9 * statistics.median(seconds) / layer.x.size,
            )
        )
    return errors


def averaged(errors: Iterable[Error]) -> list[Error]:
    """Returns each policy's means over the layers.

    Bits and times are weighted by the elements of a layer; error and cosine are not.
    """
    by_policy: dict[str, list[Error]] = {}
    for each in errors:
        by_policy.setdefault(each.policy, []).append(each)
    return [
        Error(
            of_layers[0].family,
            policy,
            "mean",
            sum(each.elements for each in of_layers),
            _weighted(of_layers, "bits"),
            statistics.mean(each.error for each in of_layers),
            statistics.mean(each.cosine for each in of_layers),
            _weighted(of_layers, "compress_ns"),
        )
        for policy, of_layers in by_policy.items()
    ]


def front(errors: Iterable[Error]) -> list[Error]:
    """Returns the errors of the Pareto front: no other is as good in bits and error."""
    best, least = [], float("inf")
    for each in sorted(errors, key=lambda each: (each.bits, each.error)):
        if each.error < least:
            best.append(each)
            least = each.error
    return best


def to_csv(errors: Iterable[Error]) -> str:
    """Returns CSV, with a row for each policy and layer."""
    columns = [field.name for field in dataclasses.fields(Error)]
    rows = (
        {
            name: f"{value:.5g}" if isinstance(value, float) else value
            for name, value in dataclasses.asdict(each).items()
        }
        for each in errors
    )
    return tables.to_csv(columns, rows)


def to_markdown(
    means: Sequence[Error], layers: Sequence[Layer], config: ConfigDict
) -> str:
    """Returns the report: the front, each family's best within some bits, and all."""
    header = ("policy", "bits an element", "error", "cosine", "compress ns an element")
    elements = ", ".join(f"`{layer.name}` {layer.x.shape}" for layer in layers)
    return "\n".join(
        [
            f"{config.model.name} after {config_lib.steps(config)[1]:,} steps on "
            f"{config.dataset}. Means over the layers {elements}.",
            "",
            "## The front: less error costs more bits",
            "",
            command.table("", header, map(_row, front(means))),
            "",
            "![Error against bits](gradient_error.png)",
            "",
            "![Error against D](gradient_error_chunks.png)",
            "",
            "## Who wins where: the least error of each family within so many bits",
            "",
            _best_of_families(means),
            "",
            "## Every policy",
            "",
            command.table("", header, map(_row, sorted(means, key=lambda e: e.bits))),
            "",
        ]
    )


def _best_of_families(means: Sequence[Error]) -> str:
    families = list(dict.fromkeys(each.family for each in means))
    rows = []
    for budget in _BUDGETS:
        within = [each for each in means if each.bits <= budget]
        least = {
            family: min(
                (e for e in within if e.family == family), key=_error, default=None
            )
            for family in families
        }
        cells = [
            "-" if each is None else f"{each.error:.4f}" for each in least.values()
        ]
        winner = min(within, key=_error).policy if within else "-"
        rows.append([f"{budget:g}", *cells, winner])
    return command.table("", ["bits an element", *families, "winner"], rows)


def _error(each: Error) -> float:
    return each.error


def _row(each: Error) -> tuple[str, ...]:
    return (
        each.policy,
        f"{each.bits:.2f}",
        f"{each.error:.4f}",
        f"{each.cosine:.4f}",
        f"{each.compress_ns:.2f}",
    )


def _weighted(errors: Sequence[Error], field: str) -> float:
    total = sum(each.elements for each in errors)
    return sum(getattr(each, field) * each.elements for each in errors) / total


def _error_and_cosine(gradient: jax.Array, exact: jax.Array) -> tuple[float, float]:
    norms = jnp.linalg.norm(gradient), jnp.linalg.norm(exact)
    error = jnp.linalg.norm(gradient - exact) / norms[1]
    cosine = jnp.vdot(gradient, exact) / jnp.maximum(norms[0] * norms[1], 1e-30)
    return float(error), float(cosine)


def _captured(config: ConfigDict, workdir: Path, terminal: Terminal) -> list[Layer]:
    _, state, batch = trained.load(config, workdir)
    layers = capture(config, state, batch)
    for layer in layers:
        if not reads_all(layer.module):
            terminal.say(f"Left out: {layer.name}, which reads some positions alone.")
    # The first reads the images, which are in memory anyway: it stores no residual.
    return [layer for layer in layers[1:] if reads_all(layer.module)]


def _suits(
    layer: Layer, policies: Mapping[str, tuple[str, DropIT]], terminal: Terminal
) -> bool:
    """Returns whether every policy can compress the layer's input."""
    for _, policy in policies.values():
        try:
            key = jax.random.key(0)
            jax.eval_shape(functools.partial(compress, dropit=policy), layer.x, key=key)
        except ValueError as error:
            terminal.say(f"Left out: {layer.name}. {error}")
            return False
    return True


def _spread(layers: Sequence[Layer], count: int) -> list[Layer]:
    if count > len(layers):
        raise ConfigError(
            f"--layers={count}: the model has {len(layers)} that every policy suits."
        )
    if count == 1:
        return [layers[0]]
    places = [round(i * (len(layers) - 1) / (count - 1)) for i in range(count)]
    return [layers[place] for place in places]


if __name__ == "__main__":
    cli.launch(main)
