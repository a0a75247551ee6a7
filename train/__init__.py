"""The training program: data, models, step, loop, checkpoints and reports."""
