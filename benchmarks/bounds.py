"""Lower bounds on the time of selection on a GPU, by the bytes that it has to move.

They are computed, not measured: each array is read or written once, at the memory
bandwidth of the GPU.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.printing import command
from dropit_jax import DropIT, Residual, compress

# A row of the activation: the paper's D (§4.1).
ROW = 2**14
CHUNK_SIZES = (8, 16, 32, 64, 1024, ROW)

# Memory bandwidths of GPUs in GB/s, from NVIDIA's data sheets: "H100 Tensor Core GPU"
# (SXM5), "A100 Tensor Core GPU" (SXM, 40 GB), "RTX A5000".
BANDWIDTHS = {"h100": 3352, "a100": 1555, "a5000": 768}
_BOUND = "bound, nobody measured a time"


@dataclasses.dataclass(frozen=True)
class Bound:
    """The least time that a GPU can take, by its memory bandwidth.

    Attributes:
      section: "bound, nobody measured a time".
      target: the name of the GPU.
      bandwidth_gb_s: the bandwidth of its memory, in 10^9 bytes a second.
      chunk_size: D.
      encoding: the encoding of the positions.
      elements: the elements of the float32 activation.
      rate: the dropping rate.
      compress_bytes: bytes of the activation, which is read, and of the residual, which
        is written.
      decompress_bytes: bytes of the residual and the activation.
      compress_s: seconds for `compress_bytes` at that bandwidth.
      decompress_s: seconds for `decompress_bytes` at that bandwidth.
    """

    section: str
    target: str
    bandwidth_gb_s: int
    chunk_size: int
    encoding: str
    elements: int
    rate: float
    compress_bytes: int
    decompress_bytes: int
    compress_s: float
    decompress_s: float


def bytes_moved(function: Callable[..., Any], *arguments: Any) -> int:
    """Returns the bytes of a function's arguments and its result.

    A function that needs all its arguments cannot move fewer.

    Args:
      function: a function of arrays; it is not run.
      *arguments: arrays or `jax.ShapeDtypeStruct`s.
    """
    leaves = jax.tree.leaves((arguments, jax.eval_shape(function, *arguments)))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def encoding(shape: tuple[int, ...], drop: DropIT) -> str:
    """Returns the encoding that a policy chooses for a float32 activation."""
    forced = dataclasses.replace(drop, encoding="index")
    # Where both encodings have the same size, the policy takes the index.
    is_index = _residual(shape, drop).nbytes == _residual(shape, forced).nbytes
    return "index" if is_index else "bitmap"


@functools.cache  # tracing takes longer than everything else that is not a measurement
def _residual(shape: tuple[int, ...], drop: DropIT) -> Residual:
    """Returns the residual of a float32 activation, with abstract arrays."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(functools.partial(compress, dropit=drop), x)


def bounds(
    elements: int, rate: float, chunk_sizes: Sequence[int] = CHUNK_SIZES
) -> list[Bound]:
    """Returns the bounds of every GPU for every D.

    Args:
      elements: elements of the activation, a multiple of `ROW`.
      rate: the dropping rate.
      chunk_sizes: the sizes D.
    """
    x = jax.ShapeDtypeStruct((elements // ROW, ROW), jnp.float32)
    found = []
    for chunk_size in chunk_sizes:
        drop = DropIT(rate, chunk_size=chunk_size)
        residual = _residual(x.shape, drop)
        compress_bytes = 4 * elements + residual.nbytes
        decompress_bytes = bytes_moved(Residual.decompress, residual)
        found += [
            Bound(
                _BOUND,
                target,
                bandwidth,
                chunk_size,
                encoding(x.shape, drop),
                elements,
                rate,
                compress_bytes,
                decompress_bytes,
                1e-9 * compress_bytes / bandwidth,
                1e-9 * decompress_bytes / bandwidth,
            )
            for target, bandwidth in BANDWIDTHS.items()
        ]
    return found


def markdown(every: Sequence[Bound]) -> str:
    """Returns the bounds as a Markdown table, with a row for each D."""
    first, targets = every[0], list(dict.fromkeys(each.target for each in every))
    header = ["D", "positions", "compress MB", "decompress MB"]
    header += [f"both on {target}, µs" for target in targets]
    rows = []
    for chunk_size in dict.fromkeys(each.chunk_size for each in every):
        of_all_targets = [each for each in every if each.chunk_size == chunk_size]
        bound = of_all_targets[0]
        rows.append(
            [
                str(chunk_size),
                bound.encoding,
                f"{1e-6 * bound.compress_bytes:,.1f}",
                f"{1e-6 * bound.decompress_bytes:,.1f}",
                *(
                    f"{1e6 * (b.compress_s + b.decompress_s):,.1f}"
                    for b in of_all_targets
                ),
            ]
        )
    return command.table(
        f"### On a GPU ({_BOUND}): {first.elements:,} elements of float32, "
        f"rate {first.rate}",
        header,
        rows,
    )
