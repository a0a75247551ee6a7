"""What XLA's CPU compiler is told in tests; imported before JAX."""

from importlib import metadata

# Programs are small and run a few times, and three quarters of the tests' time went
# into compiling them. LLVM need not optimise them, nor the fusions go through MLIR, nor
# one program use two cores while another test waits for one.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
# An unknown flag ends the process, and this one went with JAX 0.11.
if metadata.version("jaxlib").startswith("0.10."):
    QUICK += " --xla_cpu_use_fusion_emitters=false"


def devices(count: int) -> str:
    """Flags for so many simulated devices."""
    return f"--xla_force_host_platform_device_count={count} {QUICK}"
