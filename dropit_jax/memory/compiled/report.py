"""Reports what a training step really allocates, as its device's compiler sees it.

XLA's GPU compiler needs no GPU, only the CUDA plugin of JAX and a description of the
card. It runs in a process of its own.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax import export

from dropit_jax.memory.compiled import (
    buffers,
    compiler_process,
    devices,
    flops,
    gpu_compiler,
    hlo,
    toolchain,
    traffic,
)
from dropit_jax.memory.compiled.buffers import Buffer
from dropit_jax.memory.compiled.call import Call
from dropit_jax.memory.compiled.toolchain import CompilerError
from dropit_jax.xla import platforms

# Autotuning times kernels, which takes the device; without the second flag matrix
# products of some odd shapes do not compile.
_XLA_FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"


@dataclasses.dataclass(frozen=True)
class CompileReport:
    """The memory and the work of a compiled function.

    Attributes:
      target: the GPU compiled for, or the local backend's platform.
      temp_bytes: the peak of everything that is neither argument nor result: cached
        activations, gradients, workspace. What DropIT saves, it saves here.
      argument_bytes: the arguments.
      output_bytes: the results, those in the place of donated arguments included.
      aliased_bytes: results in the place of donated arguments.
      flops: floating-point operations of the matrix products and convolutions of the
        compiled program, a multiplication and an addition being two. What is computed
        twice counts twice; what the compiler left out does not count, nor what it made
        a sum of (some products with a vector). Convolutions count the padding as if it
        were data, loops every step if their number is fixed, a choice its dearest
        branch, and kernels of other kinds (Pallas, cuDNN's attention) nothing.
      traffic_bytes: what the kernels of the compiled program read and write, operands
        and results of all of them added up: the best guess at a GPU's time that can be
        had without one. Loops count every step if their number is fixed, a choice its
        dearest branch; of an operand that a kernel slices, the slice.
      buffers: the largest buffers alive at the peak of `temp_bytes`, largest first. If
        all are asked for, they add up to it, but for gaps that XLA's packing leaves.
    """

    target: str
    temp_bytes: int
    argument_bytes: int
    output_bytes: int
    aliased_bytes: int
    flops: float
    traffic_bytes: int
    buffers: tuple[Buffer, ...]

    @property
    def peak_bytes(self) -> int:
        """All the memory that a run takes: arguments, results, and the rest."""
        results = self.output_bytes - self.aliased_bytes
        return self.argument_bytes + results + self.temp_bytes


def compile_report(
    step: Callable[..., Any],
    *abstract_args: Any,
    target: str | Path | None = None,
    donate: int | Sequence[int] = (),
    num_buffers: int = 20,
    compiler_options: Mapping[str, str | bool] | None = None,
) -> CompileReport:
    """Compiles a function for a device and reports what it takes there.

    Args:
      step: a function that `jax.jit` takes, or one that it gave: its `static_argnums`
        and `donate_argnums` are heeded.
      *abstract_args: its arguments, as arrays or `jax.ShapeDtypeStruct`s.
      target: a GPU, by its name in `targets()` or by the path of a description
        (XLA's `GpuTargetConfigProto` in text form); it need not be present. `None`:
        the local backend.
      donate: indices of the arguments whose memory the results may take over.
      num_buffers: how many buffers to list. (None are where a local backend does not
        say, or JAX's compilation cache had the program.)
      compiler_options: of XLA, as `jax.jit` takes them. What `XLA_FLAGS` says is not
        heeded for a target.

    Raises:
      ValueError: `donate` names an argument that there is not, or the function says
        itself what it donates; `compiler_options` names what the report sets itself;
        the function calls back to the host, and the target is another machine's.
      TargetError: the target is unknown.
      CompilerMissingError: XLA's GPU compiler is not installed; the message has the
        command for it.
      CompilerError: the compilation failed.
    """
    called = Call.of(step, abstract_args, donate)
    options = dict(compiler_options or {})
    for name in gpu_compiler.NOTES_OPTIONS:
        if name in options:
            raise ValueError(f"compiler_options: {name} is set by the report itself.")
    with tempfile.TemporaryDirectory() as directory:
        if target is None:
            name, names = jax.default_backend(), []
            lowered = called.jitted.lower(*abstract_args)
            compiled = gpu_compiler.compile_with_notes(lowered, directory, options)
            stats = gpu_compiler.memory_stats(compiled)
        else:
            description = devices.target_path(target)
            name, names = description.stem, called.names
            stats = _compile_apart(called, description, directory, options)
        program = hlo.parse(Path(directory, gpu_compiler.PROGRAM_FILE).read_text())
        largest = buffers.at_peak(Path(directory), program, names)[:num_buffers]
    return CompileReport(
        target=name,
        **stats,
        flops=flops.count(program),
        traffic_bytes=traffic.count(program),
        buffers=tuple(largest),
    )


def _compile_apart(
    called: Call, description: Path, directory: str, options: dict[str, str | bool]
) -> dict[str, int]:
    """Compiles in another process, which leaves its notes in the directory."""
    environment = toolchain.find().environment(_XLA_FLAGS)
    program = _exported(called)
    try:
        return compiler_process.compile_exported(
            program,
            environment,
            description=str(description),
            donated=[i for i, here in enumerate(called.donated) if here],
            directory=directory,
            options=options,
        )
    except CompilerError as error:
        raise CompilerError(
            f"Compiling for {description.stem} failed:\n{error}"
        ) from None


def _exported(called: Call) -> bytes:
    """The function as a portable program over flat arguments."""
    # What these do is read by the very same version of JAX that wrote it.
    unstable = [
        export.DisabledSafetyCheck.custom_call(target)
        for target in ("__gpu$xla.gpu.triton", "LayoutConstraint")
    ]
    try:
        with platforms.exporting_for_this_version():
            exported = export.export(
                jax.jit(called.flat), platforms=["cuda"], disabled_checks=unstable
            )(*called.leaves)
        return bytes(exported.serialize())
    except ValueError:
        if host_call := called.host_call():
            raise ValueError(
                f"The function calls Python on the host ({host_call}), which can be "
                "compiled for the device at hand alone: leave the call out of the "
                "function, or `target` out of the report."
            ) from None
        raise
