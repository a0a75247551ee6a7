"""What XLA's GPU compiler makes of a function."""

import tempfile
from pathlib import Path

from dropit_jax.memory.compiled import devices, gpu_compiler, report
from dropit_jax.memory.compiled.compiled_call import CompiledCall


def compiled(function, args, target="h100", options=None):
    """The memory statistics and the text of a compiled program."""
    with tempfile.TemporaryDirectory() as directory:
        stats = report._compile_apart(
            CompiledCall.of(function, tuple(args), ()),
            devices.target_path(target),
            directory,
            options or {},
        )
        return stats, Path(directory, gpu_compiler.PROGRAM_FILE).read_text()
