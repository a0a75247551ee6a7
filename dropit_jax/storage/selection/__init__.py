"""Selects the elements or channels of an array that are kept."""
