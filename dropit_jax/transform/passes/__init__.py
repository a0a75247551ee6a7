"""Runs the two passes: the forward pass stores, the backward pass rebuilds."""
