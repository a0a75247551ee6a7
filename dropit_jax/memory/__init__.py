"""Memory and operations of a training step, and the largest batch that fits.

`compile_report` asks the compiler of the device, which need not be there, and
`max_batch` searches with it; `saved_residuals` and `cached_bytes` look at what
differentiation keeps, before any compiler.
"""

from dropit_jax.memory.batches import BatchPlan, NoBatchFitsError, max_batch
from dropit_jax.memory.buffers import Buffer
from dropit_jax.memory.cached import cached_bytes
from dropit_jax.memory.devices import (
    TargetError,
    device_bytes,
    target_path,
    targets,
)
from dropit_jax.memory.gpu_compiler import memory_stats
from dropit_jax.memory.report import CompileReport, compile_report
from dropit_jax.memory.residuals import SavedResidual, SavedResiduals, saved_residuals
from dropit_jax.memory.toolchain import (
    COMPILER_PATH_VARIABLE,
    CompilerError,
    CompilerMissingError,
)

__all__ = [
    "COMPILER_PATH_VARIABLE",
    "BatchPlan",
    "Buffer",
    "CompileReport",
    "CompilerError",
    "CompilerMissingError",
    "NoBatchFitsError",
    "SavedResidual",
    "SavedResiduals",
    "TargetError",
    "cached_bytes",
    "compile_report",
    "device_bytes",
    "max_batch",
    "memory_stats",
    "saved_residuals",
    "target_path",
    "targets",
]
