"""What a training step really allocates, as the compiler of its device sees it.

XLA's GPU compiler needs no GPU, only the CUDA plugin of JAX and a description of the
card. It runs in a process of its own here, because it wants settings that must be made
before JAX starts.
"""

import dataclasses
import importlib.machinery
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax import export
from jax.extend.core import Jaxpr, Var, jaxprs_in_params

from dropit_jax.products import RESIDUAL_NAME

_TARGETS = Path(__file__).parent / "targets"

# A directory that holds JAX's CUDA plugin where the environment itself does not:
# installed beside other packages, the plugin reports at every start of JAX on a machine
# without a GPU that it found none.
COMPILER_PATH_VARIABLE = "DROPIT_GPU_COMPILER"

# Autotuning times kernels, which takes the device; without the second flag matrix
# products of some odd shapes do not compile.
_XLA_FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"


@dataclasses.dataclass(frozen=True)
class CompileReport:
    """What a compiled function takes.

    Attributes:
      target: the GPU compiled for, or the local backend's platform.
      temp_bytes: the peak of everything that is neither argument nor result: cached
        activations, gradients, workspace. What DropIT saves, it saves here.
      argument_bytes: the arguments.
      output_bytes: the results, those in the place of donated arguments included.
      aliased_bytes: results in the place of donated arguments.
    """

    target: str
    temp_bytes: int
    argument_bytes: int
    output_bytes: int
    aliased_bytes: int


class TargetError(ValueError):
    """There is no description of such a GPU."""


class CompilerError(RuntimeError):
    """The GPU compiler is missing or failed."""


def targets() -> list[str]:
    """The names of the GPUs described in this package."""
    return sorted(path.stem for path in _TARGETS.glob("*.textproto"))


def compile_report(
    step: Callable[..., Any],
    *abstract_args: Any,
    target: str | Path | None = None,
    donate: int | Sequence[int] = (),
) -> CompileReport:
    """Compiles a function for a device and reports what it allocates there.

    Args:
      step: a function that `jax.jit` takes.
      *abstract_args: its arguments, as arrays or `jax.ShapeDtypeStruct`s.
      target: a GPU, by its name in `targets()` or by the path of a description
        (XLA's `GpuTargetConfigProto` in text form); it need not be present. `None`:
        the local backend.
      donate: indices of the arguments whose memory the results may take over.

    Raises:
      TargetError: the target is unknown.
      CompilerError: the CUDA plugin is missing, or the compilation failed.
    """
    donate = (donate,) if isinstance(donate, int) else tuple(donate)
    if target is None:
        lowered = jax.jit(step, donate_argnums=donate).lower(*abstract_args)
        stats = memory_stats(lowered.compile())
        return CompileReport(target=jax.default_backend(), **stats)
    description = _find_target(target)
    environment = _compiler_environment()
    program, donated = _exported(step, abstract_args, donate)
    command = [sys.executable, "-m", "dropit_jax.gpu_compiler"]
    command += [str(description), json.dumps(donated)]
    done = subprocess.run(
        command, input=program, env=environment, capture_output=True, check=False
    )
    if done.returncode != 0:
        raise CompilerError(
            f"Compiling for {description.stem} failed:\n"
            + done.stderr.decode(errors="replace").strip()
        )
    return CompileReport(target=description.stem, **json.loads(done.stdout))


def memory_stats(compiled: jax.stages.Compiled) -> dict[str, int]:
    """The byte counts of a `CompileReport`, read off a compiled function."""
    analysis: Any = compiled.memory_analysis()
    return {
        "temp_bytes": analysis.temp_size_in_bytes,
        "argument_bytes": analysis.argument_size_in_bytes,
        "output_bytes": analysis.output_size_in_bytes,
        "aliased_bytes": analysis.alias_size_in_bytes,
    }


def cached_bytes(fn: Callable[..., Any], *abstract_args: Any) -> int:
    """Bytes that the DropIT operations in `fn` cache for their backward pass.

    Counts every residual in the traced function, in each step of a loop. Nothing runs
    and nothing is allocated.

    Args:
      fn: a function that differentiates, such as a training step.
      *abstract_args: its arguments, as arrays or `jax.ShapeDtypeStruct`s.
    """
    jaxpr = jax.make_jaxpr(fn)(*abstract_args).jaxpr
    return _named_bytes(jaxpr, RESIDUAL_NAME)[0]


def _named_bytes(jaxpr: Jaxpr, name: str) -> tuple[int, list[bool]]:
    """Bytes of the named arrays that something reads, and which inputs are read."""
    total, read = 0, {v for v in jaxpr.outvars if isinstance(v, Var)}
    for equation in reversed(jaxpr.eqns):
        if not (equation.effects or read.intersection(equation.outvars)):
            continue
        inputs = [True] * len(equation.invars)
        if equation.primitive.name == "name" and equation.params["name"] == name:
            avals: list[Any] = [variable.aval for variable in equation.outvars]
            total += sum(math.prod(a.shape) * a.dtype.itemsize for a in avals)
        repeats = equation.params.get("length", 1)  # of a scan's body
        for inner in jaxprs_in_params(equation.params):
            nbytes, inputs_read = _named_bytes(inner, name)
            total += repeats * nbytes
            if equation.primitive.name == "custom_vjp_call":
                # It is not differentiated: what only its forward rule reads is not.
                inputs = inputs_read
        read |= {
            variable
            for variable, is_read in zip(equation.invars, inputs, strict=True)
            if is_read and isinstance(variable, Var)
        }
    return total, [variable in read for variable in jaxpr.invars]


def _find_target(target: str | Path) -> Path:
    path = Path(target)
    if path.is_file():
        return path
    if str(target) in targets():
        return _TARGETS / f"{target}.textproto"
    raise TargetError(
        f"Unknown target {str(target)!r}: give one of {', '.join(targets())}, or the "
        "path of a GPU description."
    )


def _compiler_environment() -> dict[str, str]:
    """The environment of the process that compiles.

    Raises:
      CompilerError: there is no CUDA plugin in it.
    """
    extra = os.environ.get(COMPILER_PATH_VARIABLE)
    path = [entry or str(Path.cwd()) for entry in sys.path]
    path = [extra, *path] if extra else path
    find = importlib.machinery.PathFinder.find_spec
    if not any(find(f"jax_cuda{n}_plugin", path) for n in (12, 13)):
        raise CompilerError(
            "Compiling for a GPU takes JAX's CUDA plugin (no GPU and no CUDA needed): "
            f'pip install "jax-cuda12-plugin=={jax.__version__}"'
        )
    settings = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": _XLA_FLAGS,
        "PYTHONPATH": os.pathsep.join(path),
    }
    return os.environ | settings


def _exported(
    step: Callable[..., Any], abstract_args: tuple[Any, ...], donate: tuple[int, ...]
) -> tuple[bytes, list[int]]:
    """The function as a portable program over flat arguments, and the donated ones."""
    leaves, structure = jax.tree.flatten(abstract_args)
    donated = [
        argument in donate
        for argument, tree in enumerate(abstract_args)
        for _ in jax.tree.leaves(tree)
    ]

    def flat_step(*leaves: Any) -> list[Any]:
        return jax.tree.leaves(step(*jax.tree.unflatten(structure, leaves)))

    exported = export.export(jax.jit(flat_step), platforms=["cuda"])(*leaves)
    return bytes(exported.serialize()), [i for i, here in enumerate(donated) if here]
