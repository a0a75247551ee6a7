"""Runs on disk: working directory, checkpoints and recorded metrics."""
