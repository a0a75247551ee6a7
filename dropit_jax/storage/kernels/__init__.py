"""GPU kernels that compress and decompress in one pass, in Pallas through Triton.

`definitions` defines in plain JAX what they compute, and computes it where
there is no NVIDIA GPU.
"""
