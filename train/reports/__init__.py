"""Measurements, summaries and figures of runs."""
