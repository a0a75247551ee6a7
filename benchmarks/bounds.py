"""The bytes that selection has to move, and the least time that a GPU takes for them.

It is arithmetic, and nobody measured a time: each array is read or written once, at the
memory bandwidth of the GPU.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import command
from dropit_jax import DropIT, Residual, compress

# A row of the activation: the paper's D (§4.1).
ROW = 2**14
CHUNK_SIZES = (8, 16, 32, 64, 1024, ROW)

# GB/s of a GPU's memory, by NVIDIA's data sheets: "H100 Tensor Core GPU" (SXM5),
# "A100 Tensor Core GPU" (SXM, 40 GB), "RTX A5000".
BANDWIDTHS = {"h100": 3352, "a100": 1555, "a5000": 768}
_BOUND = "bound, nobody measured a time"


@dataclasses.dataclass(frozen=True)
class Bound:
    """The least that a GPU can take, by what has to go through its memory.

    Attributes:
      section: "bound, nobody measured a time".
      target: the GPU.
      bandwidth_gb_s: of its memory, in 10^9 bytes a second.
      chunk_size: D.
      encoding: of the positions.
      elements: of the float32 activation.
      rate: the share that is dropped.
      compress_bytes: of the activation and the residual.
      decompress_bytes: of the residual and the activation.
      compress_s: seconds that these take at that bandwidth.
      decompress_s: likewise.
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
    """Bytes of a function's arguments and of its result.

    It cannot move fewer if it needs all of the arguments.

    Args:
      function: of arrays; it does not run.
      *arguments: arrays or `jax.ShapeDtypeStruct`s.
    """
    leaves = jax.tree.leaves((arguments, jax.eval_shape(function, *arguments)))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def encoding(shape: tuple[int, ...], drop: DropIT) -> str:
    """How the positions in a float32 activation are stored."""
    forced = dataclasses.replace(drop, encoding="index")
    # `DropIT.encoding`: of two equal ones the index.
    is_index = _residual(shape, drop).nbytes == _residual(shape, forced).nbytes
    return "index" if is_index else "bitmap"


@functools.cache  # to trace takes longer than all else that is no measurement
def _residual(shape: tuple[int, ...], drop: DropIT) -> Residual:
    """The residual of a float32 activation under a policy; its arrays are abstract."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(functools.partial(compress, dropit=drop), x)


def bounds(
    elements: int, rate: float, chunk_sizes: Sequence[int] = CHUNK_SIZES
) -> list[Bound]:
    """The shortest times that the bandwidths of GPUs allow.

    Args:
      elements: of the activation, a multiple of `ROW`.
      rate: the share that is dropped.
      chunk_sizes: every D.
    """
    x = jax.ShapeDtypeStruct((elements // ROW, ROW), jnp.float32)
    found = []
    for chunk_size in chunk_sizes:
        drop = DropIT(rate, chunk_size=chunk_size)
        residual = _residual(x.shape, drop)
        # The activation is read and the residual written, and the other way round.
        moved = 4 * elements + residual.nbytes
        moved_back = bytes_moved(Residual.decompress, residual)
        found += [
            Bound(
                _BOUND,
                target,
                bandwidth,
                chunk_size,
                encoding(x.shape, drop),
                elements,
                rate,
                moved,
                moved_back,
                1e-9 * moved / bandwidth,
                1e-9 * moved_back / bandwidth,
            )
            for target, bandwidth in BANDWIDTHS.items()
        ]
    return found


def markdown(every: Sequence[Bound]) -> str:
    """The bounds as a table, a row for each D."""
    first, targets = every[0], list(dict.fromkeys(each.target for each in every))
    header = ["D", "positions", "compress MB", "decompress MB"]
    header += [f"both on {target}, µs" for target in targets]
    rows = []
    for chunk_size in dict.fromkeys(each.chunk_size for each in every):
        of_size = [each for each in every if each.chunk_size == chunk_size]
        here = of_size[0]
        rows.append(
            [
                str(chunk_size),
                here.encoding,
                f"{1e-6 * here.compress_bytes:,.1f}",
                f"{1e-6 * here.decompress_bytes:,.1f}",
                *(f"{1e6 * (b.compress_s + b.decompress_s):,.1f}" for b in of_size),
            ]
        )
    return command.table(
        f"### On a GPU ({_BOUND}): {first.elements:,} elements of float32, "
        f"rate {first.rate}",
        header,
        rows,
    )
