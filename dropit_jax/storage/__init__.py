"""Compressed arrays: chunks, selection of elements, encodings, and packed codes."""
