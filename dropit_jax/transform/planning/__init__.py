"""Chooses which values are stored, and in what form; the others are recomputed."""
