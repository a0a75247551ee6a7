"""Compiles exported programs for GPUs that need not be there.

`compiler_process` runs this module as a process, which compiles one program after the
other until its standard input ends. A request is a line of JSON, the
arguments of `compile_exported` and the size of the program that follows. An answer is a
line of JSON, the byte counts or an error.
"""

import json
import os
import sys
import traceback
from collections.abc import Sequence
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


def main() -> None:
    """Answers requests until there are no more."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nothing else is an answer
    while line := sys.stdin.buffer.readline():
        request = json.loads(line)
        program = sys.stdin.buffer.read(request.pop("size"))
        try:
            answer: dict[str, Any] = {"stats": compile_exported(program, **request)}
        except Exception:  # whatever it is, it is told where it was asked for
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)
        jax.clear_caches()


def compile_exported(
    program: bytes,
    description: str,
    donated: Sequence[int],
    directory: str,
    options: dict[str, str | bool],
) -> dict[str, int]:
    """Compiles an exported program, and returns its memory statistics.

    Args:
      program: what `jax.export` made of a function.
      description: the path of the GPU description.
      donated: indices of the arguments whose memory the results may take over.
      directory: where the compiler leaves its notes.
      options: of the compiler.
    """
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=Path(description).read_text(), topology="1x1x1"
    )
    device = NamedSharding(
        topologies.make_mesh(topology, (1,), ("device",)), PartitionSpec()
    )
    exported = export.deserialize(bytearray(program))
    args = [
        jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=device)
        for aval in exported.in_avals
    ]
    step = jax.jit(exported.call, donate_argnums=tuple(donated))
    compiled = compile_with_notes(step.lower(*args), directory, options)
    return memory_stats(compiled)


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
    main()
