"""GPU kernels that compress and decompress in one pass, in Pallas through Triton.

`dropit_jax.kernels.twins` defines in plain JAX what they compute, and computes it where
there is no NVIDIA GPU.
"""

from dropit_jax.kernels.dispatch import compress as compress
from dropit_jax.kernels.dispatch import decompress as decompress
from dropit_jax.kernels.plan import Plan as Plan
from dropit_jax.kernels.plan import supported as supported
