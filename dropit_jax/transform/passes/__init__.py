"""The two passes as they run: the forward one stores, the backward one rebuilds."""
