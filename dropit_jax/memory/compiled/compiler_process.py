"""The process that compiles for GPUs.

It needs settings that must be made before JAX starts. It is kept for the next program,
as it takes longer to start than a small program to compile.
"""

import atexit
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from dropit_jax.memory.compiled import gpu_compiler
from dropit_jax.memory.compiled.toolchain import CompilerError

_PROGRAM = f"from {gpu_compiler.__name__} import main; main()"


class _Process:
    """A process that compiles one program after the other."""

    def __init__(self, environment: dict[str, str]):
        self.environment = environment
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            # -P: not from the working directory.
            [sys.executable, "-P", "-c", _PROGRAM],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )

    def compile(self, program: bytes, request: dict[str, Any]) -> dict[str, Any]:
        """The answer of `gpu_compiler` to a request.

        Raises:
          CompilerError: the process ended; the message is what it printed.
        """
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        printed_before = self._log.seek(0, os.SEEK_END)
        heading = json.dumps(request | {"size": len(program)})
        with contextlib.suppress(BrokenPipeError):  # it has ended, and says why
            requests.write(f"{heading}\n".encode() + program)
            requests.flush()
        if line := answers.readline():
            answer: dict[str, Any] = json.loads(line)
            return answer
        self._process.wait()
        self._log.seek(printed_before)
        printed = self._log.read().decode(errors="replace").strip()
        raise CompilerError(printed or f"It ended with {self._process.returncode}.")

    def is_alive(self) -> bool:
        """Whether it can take a request."""
        return self._process.poll() is None

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()


# The processes that are free: one, unless several threads compile.
_idle: list[_Process] = []
os.register_at_fork(after_in_child=_idle.clear)


def compile_exported(
    program: bytes, environment: dict[str, str], **request: Any
) -> dict[str, int]:
    """`gpu_compiler.compile_exported(program, **request)`, in a process.

    Args:
      program: what `jax.export` made of a function.
      environment: the process's environment variables.
      **request: the other arguments.

    Raises:
      CompilerError: the compilation failed; the message is what was printed.
    """
    process = _free(environment)
    try:
        answer = process.compile(program, request)
    except BaseException:  # an interrupt, too, leaves it in the midst of something
        process.close()
        raise
    _idle.append(process)
    if "error" in answer:
        raise CompilerError(answer["error"].strip())
    stats: dict[str, int] = answer["stats"]
    return stats


def _free(environment: dict[str, str]) -> _Process:
    """A process with this environment; others, and those that died, are ended."""
    with contextlib.suppress(IndexError):
        while True:
            process = _idle.pop()
            if process.environment == environment and process.is_alive():
                return process
            process.close()
    return _Process(environment)


@atexit.register
def _close() -> None:
    while _idle:
        _idle.pop().close()
