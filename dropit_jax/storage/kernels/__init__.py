"""GPU kernels that compress and decompress in one pass, in Pallas through Triton.

`definitions` defines their results in plain JAX, and computes them where there is no
NVIDIA GPU.
"""
