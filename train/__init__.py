"""The training program: data, models, step, loop, checkpoints and reports."""

import os
import sys

if sys.argv[:1] == ["-m"]:
    # A command of this package starts, and imports take seconds.
    from train import interrupts

    interrupts.end_in_one_line()
    # Of XLA's own log, errors alone; it is set up when JAX is imported.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
