"""Compiles an exported program for a GPU that need not be there.

Run by `dropit_jax.memory` as a process: program on standard input, the path of the GPU
description and the JSON list of donated arguments on the command line, JSON on
standard output.
"""

import json
import sys
from pathlib import Path

import jax
from jax import export
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from dropit_jax.memory import memory_stats


def main(description: str, donated: str) -> None:
    """Compiles the program on standard input and prints its memory statistics."""
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=Path(description).read_text(), topology="1x1x1"
    )
    device = NamedSharding(
        topologies.make_mesh(topology, (1,), ("device",)), PartitionSpec()
    )
    program = export.deserialize(bytearray(sys.stdin.buffer.read()))
    args = [
        jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=device)
        for aval in program.in_avals
    ]
    step = jax.jit(program.call, donate_argnums=tuple(json.loads(donated)))
    print(json.dumps(memory_stats(step.lower(*args).compile())))


if __name__ == "__main__":
    main(*sys.argv[1:])
