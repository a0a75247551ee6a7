"""Checkpoints of a run: their directories, checksums and structure."""

from train.runs.checkpoints.checkpoints import Checkpoints

__all__ = ["Checkpoints"]
