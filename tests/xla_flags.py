"""What XLA is told in tests; imported before JAX.

An unknown flag ends the process, so some depend on the version.
"""

from importlib import metadata

_IS_OLD = metadata.version("jaxlib").startswith("0.10.")

# Programs are small and run a few times, and three quarters of the tests' time went
# into compiling them. LLVM need not optimise them, nor the fusions go through MLIR, nor
# one program use two cores while another test waits for one.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if _IS_OLD:
    QUICK += " --xla_cpu_use_fusion_emitters=false"

# With it the PTX of kernels is among the compiler's notes.
KEEP_PTX = "" if _IS_OLD else "--xla_dump_emitter_re=.*"


def devices(count: int) -> str:
    """Flags for so many simulated devices."""
    return f"--xla_force_host_platform_device_count={count} {QUICK}"
