"""Traces a function with JAX, and splits it into a forward and a backward pass."""
