"""XLA's flags in tests, set before JAX is imported.

An unknown flag ends the process, so some depend on the version.
"""

from importlib import metadata

_IS_OLD = metadata.version("jaxlib").startswith("0.10.")

# The programs of tests are small and run a few times, and compiling them took three
# quarters of the time. So LLVM does not optimise, fusions do not go through MLIR, and a
# program is compiled on one core, as another test may need the others.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if _IS_OLD:
    QUICK += " --xla_cpu_use_fusion_emitters=false"

# With this flag, XLA's dumps contain the PTX of GPU kernels.
KEEP_PTX = "" if _IS_OLD else "--xla_dump_emitter_re=.*"


def devices(count: int) -> str:
    """Returns the flags for `count` simulated devices."""
    return f"--xla_force_host_platform_device_count={count} {QUICK}"
