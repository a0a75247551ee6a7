"""Command lines, timing, tables and figures of the benchmarks."""
