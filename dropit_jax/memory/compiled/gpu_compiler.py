"""Compiles exported programs for GPUs that need not be present.

`compiler_process` runs this module as a process, which answers requests until its
standard input ends. A request is a line of JSON (the arguments of `compile_exported`,
and `size`, the bytes of the program), then the program. An answer is a line of JSON:
`{"stats": ...}` or `{"error": ...}`.
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

# The options with which XLA writes notes: files on the buffers of a program.
NOTES_OPTIONS = ("xla_dump_to", "xla_dump_hlo_as_text")

# The file with the text of the compiled program, next to XLA's notes.
PROGRAM_FILE = "compiled_program.txt"


def main() -> None:
    """Answers requests from standard input until it ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    # Other output must not mix with the answers.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    while line := sys.stdin.buffer.readline():
        request = json.loads(line)
        program = sys.stdin.buffer.read(request.pop("size"))
        try:
            answer: dict[str, Any] = {"stats": compile_exported(program, **request)}
        except Exception:  # reported by the process that sent the request
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
    """Compiles an exported program for one GPU.

    Returns `memory_stats`: the bytes of arguments, results and temporary memory.

    Args:
      program: a serialised `jax.export.Exported`.
      description: the path of the GPU description.
      donated: indices of the arguments whose memory the results may reuse.
      directory: the directory for XLA's notes and the text of the program.
      options: options of XLA.
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
    """Returns a compiled program, and writes its text and buffers to a directory.

    XLA writes notes on the buffers it assigns; `PROGRAM_FILE` has the program's text.
    """
    notes = dict.fromkeys(NOTES_OPTIONS, True) | {"xla_dump_to": directory}
    compiled = lowered.compile(compiler_options=options | notes)
    Path(directory, PROGRAM_FILE).write_text(compiled.as_text() or "")
    return compiled


def memory_stats(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Returns the byte counts of a compiled function, by `CompileReport`'s fields.

    A function that is sharded over several devices has the byte counts of one device.
    """
    analysis: Any = compiled.memory_analysis()
    return {
        "temp_bytes": analysis.temp_size_in_bytes,
        "argument_bytes": analysis.argument_size_in_bytes,
        "output_bytes": analysis.output_size_in_bytes,
        "aliased_bytes": analysis.alias_size_in_bytes,
    }


if __name__ == "__main__":
    main()
