"""Compiles for GPUs in a separate process.

XLA's options and `JAX_PLATFORMS` must be set before JAX starts. The process serves many
programs, as its start takes longer than compiling a small one.
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
            # -P: import nothing from the working directory.
            [sys.executable, "-P", "-c", _PROGRAM],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )

    def compile(self, program: bytes, request: dict[str, Any]) -> dict[str, Any]:
        """Sends a request to `gpu_compiler`, and returns its answer.

        Raises:
          CompilerError: the process ended; the message is its output.
        """
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        printed_before = self._log.seek(0, os.SEEK_END)
        heading = json.dumps(request | {"size": len(program)})
        with contextlib.suppress(BrokenPipeError):  # reported below
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
        """Returns whether the process can take a request."""
        return self._process.poll() is None

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()


# The idle processes: one, unless several threads compile. A forked child forgets them:
# the pipes are for its parent alone.
_idle: list[_Process] = []
os.register_at_fork(after_in_child=_idle.clear)


def compile_exported(
    program: bytes, environment: dict[str, str], **request: Any
) -> dict[str, int]:
    """Runs `gpu_compiler.compile_exported` in a separate process; returns its result.

    Args:
      program: a serialised `jax.export.Exported`.
      environment: the environment variables of the process.
      **request: the other arguments of `gpu_compiler.compile_exported`.

    Raises:
      CompilerError: the compilation failed; the message is the traceback, or the output
        of a process that ended.
    """
    process = _take_process(environment)
    try:
        answer = process.compile(program, request)
    except BaseException:  # an interrupt, too: the answer would be left unread
        process.close()
        raise
    _idle.append(process)
    if "error" in answer:
        raise CompilerError(answer["error"].strip())
    stats: dict[str, int] = answer["stats"]
    return stats


def _take_process(environment: dict[str, str]) -> _Process:
    """Returns an idle process with this environment, or starts a process.

    Ends the idle processes that it tries first and that are dead or have another
    environment.
    """
    with contextlib.suppress(IndexError):
        while True:
            process = _idle.pop()
            if process.environment == environment and process.is_alive():
                return process
            process.close()
    return _Process(environment)


@atexit.register
def _close_idle() -> None:
    while _idle:
        _idle.pop().close()
