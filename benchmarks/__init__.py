"""The benchmarks, which print every number of the docs."""
