"""Memory and operations of a training step, and the largest batch that fits.

`compile_report` and `max_batch` compile for a device, which need not be present;
`saved_residuals` and `cached_bytes` list the residuals of the traced function, before
a compiler has changed them.
"""

from dropit_jax.memory.compiled.batches import BatchPlan, NoBatchFitsError, max_batch
from dropit_jax.memory.compiled.buffers import Buffer
from dropit_jax.memory.compiled.devices import (
    TargetError,
    device_bytes,
    target_path,
    targets,
)
from dropit_jax.memory.compiled.gpu_compiler import memory_stats
from dropit_jax.memory.compiled.report import CompileReport, compile_report
from dropit_jax.memory.compiled.toolchain import (
    COMPILER_PATH_VARIABLE,
    CompilerError,
    CompilerMissingError,
)
from dropit_jax.memory.traced.cached import cached_bytes
from dropit_jax.memory.traced.residuals import (
    SavedResidual,
    SavedResiduals,
    saved_residuals,
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
