"""GPU kernels that compress and decompress in one pass, in Pallas through Triton.

`dropit_jax.kernels.twins` defines in plain JAX what they compute, and computes it where
there is no NVIDIA GPU.
"""
