"""Reports the memory and operations of a compiled training step.

A step is compiled for a GPU in a separate process. XLA's GPU compiler needs no GPU,
only JAX's CUDA plugin and a description of the GPU.
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
from dropit_jax.memory.compiled.compiled_call import CompiledCall
from dropit_jax.memory.compiled.toolchain import CompilerError
from dropit_jax.xla import platforms

# Autotuning measures GPU kernels on the device, which may be absent. With Triton's
# matrix products, products of some odd shapes do not compile.
_XLA_FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"


@dataclasses.dataclass(frozen=True)
class CompileReport:
    """The memory and operations of a compiled function.

    If the function is sharded over several devices, all numbers are for one device.

    Attributes:
      target: the name of the GPU description, or the platform of the local backend.
      temp_bytes: the temporary bytes: the peak size of everything that is neither
        argument nor result, such as residuals, gradients and workspaces. DropIT
        reduces these.
      argument_bytes: the size of the arguments.
      output_bytes: the size of the results, including `aliased_bytes`.
      aliased_bytes: the size of the results that reuse the memory of donated arguments.
      flops: the floating-point operations of the matrix products and convolutions of
        the compiled program; a multiply-add counts as two. Recomputed products count
        again; products do not count that the compiler removed, or rewrote as
        multiply-and-sum (some products with a vector). Convolutions count padding as
        data. Loops count every step if the number of steps is fixed, and otherwise one
        step; conditionals the most expensive branch; other GPU kernels (Pallas, cuDNN's
        attention) nothing.
      traffic_bytes: the sum of the bytes that all GPU kernels of the compiled program
        read and write: the best estimate of a GPU's time without that GPU. Loops and
        conditionals count as in `flops`; an operand that a GPU kernel slices counts
        only as the slice.
      buffers: the largest buffers alive at the peak of `temp_bytes`, largest first. All
        buffers together add up to `temp_bytes`, except for gaps in XLA's packing.
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
        """The memory of an execution: arguments, results and temporary bytes."""
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
    """Compiles a function for a device, and returns its memory and operations.

    Args:
      step: a function, jitted or not; the `static_argnums` and `donate_argnums` of a
        jitted one apply.
      *abstract_args: the arguments of `step`, as arrays or `jax.ShapeDtypeStruct`s; on
        one device if there is a target.
      target: a GPU, as a name from `targets()` or the path of a description (XLA's
        `GpuTargetConfigProto` in text form); it need not be present. `None`: the local
        backend.
      donate: indices of the arguments whose memory the results may reuse.
      num_buffers: the maximum number of buffers to list. The list is empty if the local
        backend writes no buffer assignment, or the program came from JAX's compilation
        cache.
      compiler_options: options of XLA, as for `jax.jit`. With a target, the variable
        `XLA_FLAGS` does not apply.

    Raises:
      ValueError: `donate` is out of range, or given although the function donates or
        has static arguments; static arguments cannot be identified;
        `compiler_options` has an option that the report sets; or the function calls
        the host, and there is a target.
      TargetError: the target is unknown.
      CompilerMissingError: XLA's GPU compiler is not installed; the message has the
        command that installs it.
      CompilerError: the compilation for the target failed. The local backend raises
        errors of its own, such as `jax.errors.JaxRuntimeError`.
    """
    called = CompiledCall.of(step, abstract_args, donate)
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
        largest = buffers.buffers_at_peak(Path(directory), program, names)[:num_buffers]
    return CompileReport(
        target=name,
        **stats,
        flops=flops.count_flops(program),
        traffic_bytes=traffic.count_bytes(program),
        buffers=tuple(largest),
    )


def _compile_apart(
    called: CompiledCall,
    description: Path,
    directory: str,
    options: dict[str, str | bool],
) -> dict[str, int]:
    """Compiles in a separate process, and returns the memory statistics.

    The process writes the program and XLA's notes on buffers to the directory.
    """
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


def _exported(called: CompiledCall) -> bytes:
    """Returns the function over flat arguments, exported and serialised."""
    # Custom calls without a stability guarantee: safe, as the same version of JAX reads
    # the program.
    unstable = [
        export.DisabledSafetyCheck.custom_call(target)
        for target in ("__gpu$xla.gpu.triton", "LayoutConstraint")
    ]
    try:
        with platforms.exporting_for_this_version():
            exported = export.export(
                jax.jit(called.flat), platforms=["cuda"], disabled_checks=unstable
            )(*called.leaves)
        if exported.nr_devices > 1:
            raise ValueError(
                f"The arguments are sharded over {exported.nr_devices} devices, and a "
                "target is one GPU: give the part of a device, for example as "
                "`jax.ShapeDtypeStruct`s without shardings."
            )
        return bytes(exported.serialize())
    except ValueError:
        if host_call := called.host_call():
            raise ValueError(
                f"The function calls Python on the host ({host_call}), which can be "
                "compiled for the device at hand alone: leave the call out of the "
                "function, or `target` out of the report."
            ) from None
        raise
