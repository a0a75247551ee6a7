"""Compiles an exported program for a GPU that need not be there.

Run by `dropit_jax.memory.report` as a process, by its path, so that it starts without
importing the rest of the package: the exported program on standard input; on the
command line the path of the GPU description, the JSON list of donated arguments, a
directory for the compiler's notes, and its options as JSON. Prints the memory
statistics as JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
from jax import export
from jax.sharding import NamedSharding, PartitionSpec

from dropit_jax.compat import topologies

# The options by which the compiler leaves notes.
NOTES_OPTIONS = ("xla_dump_to", "xla_dump_hlo_as_text")

# The compiled program's text, beside what the compiler itself writes.
PROGRAM_FILE = "compiled_program.txt"


def main(description: str, donated: str, directory: str, options: str) -> None:
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
    compiled = compile_with_notes(step.lower(*args), directory, json.loads(options))
    print(json.dumps(memory_stats(compiled)))


def compile_with_notes(
    lowered: jax.stages.Lowered, directory: str, options: dict[str, str | bool]
) -> Any:
    """Compiles, and leaves the program and the notes on its buffers in a directory."""
    notes = dict.fromkeys(NOTES_OPTIONS, True) | {"xla_dump_to": directory}
    compiled = lowered.compile(compiler_options=options | notes)
    Path(directory, PROGRAM_FILE).write_text(compiled.as_text() or "")
    return compiled


def memory_stats(compiled: jax.stages.Compiled) -> dict[str, int]:
    """The byte counts of a `CompileReport`, read off a compiled function."""
    analysis: Any = compiled.memory_analysis()
    return {
        "temp_bytes": analysis.temp_size_in_bytes,
        "argument_bytes": analysis.argument_size_in_bytes,
        "output_bytes": analysis.output_size_in_bytes,
        "aliased_bytes": analysis.alias_size_in_bytes,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
