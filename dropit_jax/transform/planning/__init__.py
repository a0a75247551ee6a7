"""Chooses the values that are stored, and those that are computed again."""
