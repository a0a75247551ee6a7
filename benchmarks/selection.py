"""The time of selection and the bytes that it has to move, for every D.

`python -m benchmarks.selection [--elements=4194304] [--rate=0.875] [--json]`

The first part compresses and decompresses a float32 activation with the methods of
`DropIT.selection` on the device at hand. The peers are `lax.top_k` and
`lax.approx_max_k`, which only select, and a copy of the activation as the limit. All
take turns in one run. The bytes are a lower bound: each array is read or written once.

On an NVIDIA GPU, "auto" is the GPU kernels and "xla" their definitions in plain JAX;
elsewhere both are the same. On a GPU, use an activation many times larger than the
cache, and several calls in a turn: `--elements=268435456 --calls=10`.

The second part is computed, not measured: the least time for those bytes at the memory
bandwidth of some GPUs.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from benchmarks import bounds
from benchmarks.bounds import CHUNK_SIZES, ROW, Bound
from benchmarks.printing import command, timing
from dropit_jax import DropIT, Residual, compress

_COPY, _TOP_K, _APPROX = "copy", "lax.top_k", "lax.approx_max_k"

# The elements of the activation of the second part.
_BOUND_ELEMENTS = 2**24


@dataclasses.dataclass(frozen=True)
class Result:
    """Times of one method of selection on the device at hand.

    A peer's own operation counts as compression; it has no decompression.

    Attributes:
      section: "measured".
      method: the value of `DropIT.selection`, or the name of a peer.
      chunk_size: D; `None` for the copy.
      encoding: the encoding of the positions; `None` for a peer.
      device: the kind of device.
      calls: calls in a turn.
      elements: the elements of the activation.
      rate: the dropping rate.
      compress_s: median seconds to compress.
      decompress_s: median seconds to decompress; `None` for a peer.
      compress_elements_s: elements compressed in a second.
      decompress_elements_s: elements decompressed in a second; `None` for a peer.
      round_trip_elements_s: elements compressed and decompressed in a second.
      compress_bytes: bytes of the activation and the residual, or of a peer's argument
        and result.
      decompress_bytes: bytes of the residual and the activation; `None` for a peer.
      gb_s: both bytes over the time for both, in 10^9 bytes a second.
      copy_ratio: the time for both over the copy's in the same round.
      top_k_ratio: the time to compress over that of `lax.top_k` with D = `ROW` in the
        same round.
    """

    section: str
    method: str
    chunk_size: int | None
    encoding: str | None
    device: str
    calls: int
    elements: int
    rate: float
    compress_s: float
    decompress_s: float | None
    compress_elements_s: float
    decompress_elements_s: float | None
    round_trip_elements_s: float
    compress_bytes: int
    decompress_bytes: int | None
    gb_s: float
    copy_ratio: timing.Spread
    top_k_ratio: timing.Spread


@dataclasses.dataclass(frozen=True)
class Operation:
    """A timed method of selection, or a peer.

    Attributes:
      method: as in `Result`.
      chunk_size: as in `Result`.
      encoding: as in `Result`.
      compress: a jitted function of the activation.
      decompress: a jitted function of the result of `compress`; `None` for a peer.
    """

    method: str
    chunk_size: int | None
    encoding: str | None
    compress: Callable[[Array], Any]
    decompress: Callable[[Any], Array] | None = None

    @property
    def name(self) -> str:
        """A name that no other operation has."""
        return f"{self.method}, {self.chunk_size}"


def methods() -> tuple[str, ...]:
    """Returns the values of `DropIT.selection` that differ on the device at hand."""
    has_kernels = jax.default_backend() == "gpu"
    return ("auto", "xla", "top_k") if has_kernels else ("auto", "top_k")


def operations(
    elements: int, rate: float, chunk_sizes: Sequence[int]
) -> list[Operation]:
    """Returns the operations to time: the peers, and every method for every D.

    Args:
      elements: elements of the activation, a multiple of `ROW`.
      rate: the dropping rate.
      chunk_sizes: the sizes D.
    """
    shape, kept = (elements // ROW, ROW), DropIT(rate).kept(ROW)

    found = [
        # Adding 1 changes every value: XLA would return an unchanged argument as it is.
        Operation(_COPY, None, None, jax.jit(lambda x: x + 1)),
        Operation(_TOP_K, ROW, None, jax.jit(lambda x: lax.top_k(jnp.abs(x), kept))),
        Operation(
            _APPROX, ROW, None, jax.jit(lambda x: lax.approx_max_k(jnp.abs(x), kept))
        ),
    ]
    for chunk_size in chunk_sizes:
        for method in methods():
            drop = DropIT(rate, chunk_size=chunk_size, selection=method)  # type: ignore[arg-type]
            found.append(
                Operation(
                    method,
                    chunk_size,
                    bounds.encoding(shape, drop),
                    jax.jit(functools.partial(compress, dropit=drop)),
                    jax.jit(Residual.decompress),
                )
            )
    return found


def measure(
    elements: int,
    rate: float,
    rounds: int,
    chunk_sizes: Sequence[int] = CHUNK_SIZES,
    calls: int = 1,
) -> list[Result]:
    """Times all operations in turns.

    Args:
      elements: elements of the activation, a multiple of `ROW`.
      rate: the dropping rate.
      rounds: the number of turns of each operation.
      chunk_sizes: the sizes D.
      calls: calls in a turn.
    """
    x = jax.random.normal(jax.random.key(0), (elements // ROW, ROW))
    every = operations(elements, rate, chunk_sizes)
    compressing, decompressing = {}, {}
    for each in every:
        compressing[each.name] = functools.partial(each.compress, x)
        if each.decompress is not None:
            residual = each.compress(x)
            decompressing[each.name] = functools.partial(each.decompress, residual)
    functions = {f"compress {name}": run for name, run in compressing.items()}
    functions |= {f"decompress {name}": run for name, run in decompressing.items()}
    seconds = timing.interleaved(functions, rounds, calls=calls)
    return [_result(each, x, rate, calls, seconds, every) for each in every]


def _result(
    each: Operation,
    x: Float[Array, "rows size"],
    rate: float,
    calls: int,
    seconds: Mapping[str, Sequence[float]],
    every: Sequence[Operation],
) -> Result:
    copy, top_k = (
        seconds[f"compress {peer.name}"]
        for name in (_COPY, _TOP_K)
        for peer in every
        if peer.method == name
    )
    compress_times = seconds[f"compress {each.name}"]
    decompress_times = seconds.get(f"decompress {each.name}")
    both = (
        compress_times
        if decompress_times is None
        else [a + b for a, b in zip(compress_times, decompress_times, strict=True)]
    )
    compress_bytes, decompress_bytes = bounds.bytes_moved(each.compress, x), None
    if each.decompress is not None:
        residual = jax.eval_shape(each.compress, x)
        decompress_bytes = bounds.bytes_moved(each.decompress, residual)
    compress_s, both_s = (
        timing.spread(times).median for times in (compress_times, both)
    )
    decompress_s = (
        None if decompress_times is None else timing.spread(decompress_times).median
    )
    return Result(
        "measured",
        each.method,
        each.chunk_size,
        each.encoding,
        x.device.device_kind,  # type: ignore[union-attr]  # not sharded
        calls,
        x.size,
        rate,
        compress_s=compress_s,
        decompress_s=decompress_s,
        compress_elements_s=x.size / compress_s,
        decompress_elements_s=None if decompress_s is None else x.size / decompress_s,
        round_trip_elements_s=x.size / both_s,
        compress_bytes=compress_bytes,
        decompress_bytes=decompress_bytes,
        gb_s=1e-9 * (compress_bytes + (decompress_bytes or 0)) / both_s,
        copy_ratio=timing.ratio(both, copy),
        top_k_ratio=timing.ratio(compress_times, top_k),
    )


def markdown(results: Sequence[Result]) -> str:
    """Returns the measurements as a Markdown table."""
    first = results[0]
    header = [
        "method",
        "D",
        "positions",
        "compress ms",
        "decompress ms",
        "compress 10⁶/s",
        "decompress 10⁶/s",
        "both 10⁶/s",
        "compress MB",
        "decompress MB",
        "GB/s",
        "both / copy",
        "compress / lax.top_k",
    ]
    rows = [
        [
            result.method,
            _text(result.chunk_size),
            _text(result.encoding),
            _text(result.compress_s, 1e3, 3),
            _text(result.decompress_s, 1e3, 3),
            _text(result.compress_elements_s, 1e-6),
            _text(result.decompress_elements_s, 1e-6),
            _text(result.round_trip_elements_s, 1e-6),
            _text(result.compress_bytes, 1e-6),
            _text(result.decompress_bytes, 1e-6),
            _text(result.gb_s, 1),
            str(result.copy_ratio),
            str(result.top_k_ratio),
        ]
        for result in results
    ]
    return command.table(
        f"### {first.elements:,} elements of float32, rate {first.rate}, "
        f"{command.machine(first.device)}",
        header,
        rows,
    )


def _text(
    value: float | str | None, scale: float | None = None, digits: int = 1
) -> str:
    if value is None:
        return "-"
    return str(value) if scale is None else f"{scale * float(value):,.{digits}f}"


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("selection", __doc__)
    parser.add_argument(
        "--elements",
        type=int,
        default=2**22,
        help=f"of the activation, a multiple of {ROW} (default: %(default)s)",
    )
    parser.add_argument(
        "--rate", type=float, default=0.875, help="what is dropped (default: 0.875)"
    )
    parser.add_argument(
        "--rounds", type=timing.count, default=9, help="(default: %(default)s)"
    )
    parser.add_argument(
        "--calls",
        type=timing.count,
        default=1,
        help="how often each runs in its turn (default: %(default)s)",
    )
    return parser


def _check(elements: int, rate: float) -> None:
    if elements < 1 or elements % ROW:
        raise ValueError(f"--elements: takes a multiple of {ROW}, got {elements}")
    if not 0 < rate < 1:
        raise ValueError(f"--rate: takes a number between 0 and 1, got {rate}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and prints its results."""
    parser = _parser()
    flags = parser.parse_args(arguments)
    try:
        _check(flags.elements, flags.rate)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{flags.elements} elements, {flags.rounds} rounds", file=sys.stderr)
    results = measure(flags.elements, flags.rate, flags.rounds, calls=flags.calls)
    least = bounds.bounds(_BOUND_ELEMENTS, flags.rate)
    if flags.json:
        every: list[Result | Bound] = [*results, *least]
        print(command.to_json(every))
        return
    print(markdown(results), end="\n\n")
    print(
        f"{timing.DEFINITION} GB/s: the bytes of both over the time of both. The copy "
        "is x + 1, which XLA cannot leave out; lax's methods select and do no more.\n"
    )
    print(bounds.markdown(least))


if __name__ == "__main__":
    main()
